"""The library: its names, their types, and its functions against the model and numpy."""

import dataclasses
import inspect
import json
import pydoc
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import TINY_TEXT

import saejax
from saejax import cli, progress
from saejax.activations.documents import COLUMNS, Documents
from saejax.config import to_json
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.temporal import TemporalSAE
from saejax.errors import UserError
from saejax.interpret import absorption
from saejax.interpret.jacobian_lens import JacobianLens
from saejax.interventions.edits import mask
from saejax.interventions.settings import AblateConfig, ProbeConfig, SteerConfig
from saejax.interventions.table import EffectsTable
from saejax.models.tokens import bos_tokens
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.registry import all_stages
from saejax.settings_from_keywords import make_config
from saejax.training.settings import TrainConfig

ROOT = Path(__file__).parent.parent
SITE = "resid_post.1"
TEXTS = [sentence.strip() + "." for sentence in TINY_TEXT.split(".") if sentence.strip()] * 6
LINES = [
    ("train", "The cat near the", " dogs", " runs"),
    ("train", "The dogs near the", " cat", " run"),
    ("test", "She saw the", " dogs", " runs"),
    ("test", "One day, the cat near the", " cat", " runs"),
    ("test", "The war lasted from the", " year", " way"),
]
#: functions that take settings as keywords.
SETTINGS = dict(train=TrainConfig, train_all=TrainConfig, finetune=TrainConfig)
SETTINGS |= dict(ablate=AblateConfig, steer=SteerConfig, probe=ProbeConfig)
PROMPTS = [saejax.Prompt("animal", *line) for line in LINES]


@pytest.fixture(scope="module")
def acts(lm):
    return saejax.capture(lm, TEXTS, [SITE, "mlp_in.1", "mlp_out.1"], batch_tokens=256)


@pytest.fixture(scope="module")
def clean_nats(lm):
    """The negative log-likelihood of each next token of the first texts."""
    nats: list[float] = []
    for text in TEXTS[:5]:
        tokens = lm.tokenize([text])
        logits_TxV = np.asarray(lm(tokens).logits_BxTxV[0], np.float64)
        logp_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
        targets_T = tokens.ids_BxT[0, 1:]
        nats += (-logp_TxV[np.arange(len(targets_T)), targets_T]).tolist()
    return nats


@pytest.fixture(scope="module")
def sae(lm, acts):
    lines: list[str] = []
    settings = dict(k=8, expansion=2, batch=64, epochs=6, learning_rate=3e-3, log_every=1, mesh=lm.mesh)
    dictionary = saejax.train(acts, SITE, "topk", on_progress=lines.append, **settings)
    assert any("step" in line for line in lines)
    return dictionary


def test_the_library_has_what_it_promises():
    promised = "load_model load_dictionary load_transcoders capture train evaluate ablate patch trace Graph export"
    assert set(promised.split()) <= set(saejax.__all__)
    assert {name for name in dir(saejax) if not name.startswith("_")} == set(saejax.__all__), "completion shows imports"
    for name in saejax.__all__:
        assert getattr(saejax, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        saejax.no_such_name  # noqa: B018
    modules = {path.stem for path in Path(saejax.__file__).parent.iterdir()}
    assert not modules & set(saejax.__all__), "a module would hide the function of its name"


def test_signatures_name_what_a_function_takes():
    """Keywords that are a config's fields are listed with their defaults, as ``help`` and editors show them."""
    functions = {name: member for name in saejax.__all__ if callable(member := getattr(saejax, name))}
    for name in [name for name in functions if inspect.isclass(functions[name])]:
        members = inspect.getmembers(functions[name], callable)
        functions |= {f"{name}.{of}": member for of, member in members if not of.startswith("_")}
    for name, function in functions.items():
        if inspect.isclass(function) or not str(getattr(function, "__module__", "")).startswith("saejax"):
            continue
        parameters = inspect.signature(function).parameters
        assert not any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()), name
        if config := SETTINGS.get(name):
            defaults = {field.name: field for field in dataclasses.fields(config) if field.name in parameters}
            listed = function.__doc__.partition("Settings:\n")[2]
            given = {
                entry: parameters[entry].default
                for entry, field in defaults.items()
                if parameters[entry].default == field.default and f"\n  {entry}: " in f"\n{listed}"
            }
            assert len(given) >= 4 and config(**given) == config() and make_config(config, **given)
            assert f"default {given['seed']!r}" in " ".join(listed.split())
    assert {name for name, function in functions.items() if "**settings:" in function.__doc__} == set(SETTINGS)
    assert inspect.signature(saejax.train).parameters["k"].default == (32,)
    assert "bandwidth" in inspect.signature(saejax.train).parameters
    assert not {"kinds", "sites", "settings"} & set(inspect.signature(saejax.train).parameters)
    assert "  random_sets: " in help_of(saejax.ablate) and "random_sets" in help_of(saejax.ablate).partition("->")[0]


def help_of(function) -> str:
    return pydoc.plain(pydoc.render_doc(function))


def test_calls_that_take_long_show_how_far_they_are(lm, acts, sae, tiny_llama, tmp_path, monkeypatch):
    bars = []

    class Bar:
        """In place of tqdm's, which draws nothing where nobody looks on."""

        def __init__(self, desc, disable, delay, leave):
            assert disable and not leave
            self.title, self.n, self.total = desc, 0, None
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            self.n += count

    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(absorption, "score_letters", lambda *words: ())  # there are too few
    settings = dict(k=8, expansion=1, batch=64, max_steps=1, on_progress=None, form="transcoder")
    saejax.save_dictionary(tmp_path / "set" / "layer1", saejax.train(acts, "mlp_in.1", **settings))
    calls = dict(
        load_model=lambda: saejax.load_model(str(tiny_llama)),
        load_transcoders=lambda: saejax.load_transcoders(tmp_path / "set"),
        capture=lambda: saejax.capture(lm, TEXTS, SITE),
        evaluate=lambda: saejax.evaluate(lm, sae, TEXTS[:5]),
        label_features=lambda: saejax.label_features(lm, acts, sae),
        top_contexts=lambda: saejax.top_contexts(lm, acts, sae, 0),
        measure_absorption=lambda: saejax.measure_absorption(lm, sae),
        match_features=lambda: saejax.match_features(sae, sae),
        group_features=lambda: saejax.group_features(acts, sae, resamples=2),
        falsify=lambda: saejax.falsify(lm, sae, [1], TEXTS, TEXTS),
        generate=lambda: lm.generate(lm.tokenize(TEXTS[:1]), 4, stop=["no such text"]),
    )
    for name, call in calls.items():
        bars.clear()
        call()
        shown = [bar for bar in bars if bar.title == name]
        assert shown and all(bar.n == bar.total > 0 for bar in shown), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda of: saejax.capture("smollm2", TEXTS, SITE), r"lm is a str: .* saejax.load_model\(NAME\)"),
        (lambda of: saejax.load_model(None), "the model is None: expected 'smollm2', a hub id, a folder"),
        (lambda of: saejax.evaluate(of.sae, of.lm, TEXTS), r"lm is a Dictionary: .* saejax.load_model\(NAME\)"),
        (lambda of: saejax.evaluate(of.lm, "runs/x", TEXTS), r"dictionary is a str: .* saejax.load_dictionary\("),
        (lambda of: saejax.evaluate(of.lm, None, TEXTS), "dictionary is None: expected the result of"),
        (lambda of: saejax.ablate(of.lm, [of.sae, 3], PROMPTS), "dictionary holds an item that is an int: "),
        (lambda of: saejax.ablate(of.lm, of.sae, ["The cat"]), r"prompts holds an item that is a str: .*make_pro"),
        (lambda of: saejax.patch(of.lm, "capital"), r"prompts is a str: .* saejax.make_prompts\("),
        (lambda of: saejax.train(of.acts.values[SITE]), r"acts is an? ndarray: .* saejax.capture\(lm, texts, sites\)"),
        (lambda of: saejax.save_dictionary(of.sae, "x"), r"dictionary is a str: .* saejax.load_dictionary\("),
        (lambda of: saejax.trace(model="smollm2", dictionaries=of.sae, prompt="x"), "model is a str: "),
        (lambda of: saejax.ablate(of.lm, of.sae, PROMPTS, documents=TEXTS[0]), "documents is one string: "),
        (lambda of: saejax.steer(of.lm, of.sae, PROMPTS, documents=TEXTS[0]), "documents is one string: "),
        (lambda of: saejax.falsify(of.lm, of.sae, [1], TEXTS[0], TEXTS), "texts is one string: expected a list"),
        (lambda of: saejax.fit_jacobian_lens(of.lm, TEXTS[0]), "texts is one string: expected a list"),
        (lambda of: saejax.fit_jacobian_lens(of.lm, TEXTS, layers=1), "layers is one number: expected a list"),
        (lambda of: saejax.patch(of.lm, PROMPTS, layers=np.int32(1)), "layers is one number: expected a list"),
        (lambda of: saejax.verdict("runs/x"), r"table is a str: .* saejax.load_effects\(FOLDER\)"),
        (lambda of: saejax.intervene(of.lm, []), r"local is a LanguageModel: .* saejax.LocalModel\("),
    ],
)
def test_an_argument_of_another_class_is_refused_in_a_line(lm, acts, sae, call, message):
    """Names and folders in place of what they stand for, arguments in another order, bare arrays."""
    with pytest.raises(UserError, match=message):
        call(SimpleNamespace(lm=lm, acts=acts, sae=sae))


def test_a_folder_may_be_a_path(lm):
    assert saejax.load_model(Path(lm.source.folder)).config == lm.config


def test_wrong_numbers_of_arguments_and_unknown_names_are_told_by_python(lm):
    with pytest.raises(TypeError, match=r"capture\(\) missing 1 required positional argument: 'sites'"):
        saejax.capture(lm, TEXTS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'"):
        saejax.capture("smollm2", TEXTS, SITE, device="cuda")
    with pytest.raises(TypeError, match=r"keyword argument 'batch_size'\. Did you mean 'batch_tokens'\?"):
        saejax.capture(lm, TEXTS, SITE, batch_size=3)


def test_misspelt_names_of_methods_are_told_with_the_nearest_ones(lm, sae, acts):
    tokens = lm.tokenize(TEXTS[:1])
    for call, right in (
        (lambda: lm.generate(tokens, max_tokens=3), r"LanguageModel.generate\(\) .* Did you mean 'max_new_tokens'\?$"),
        (lambda: lm.tokenize(text=TEXTS), "'texts'"),
        (lambda: lm(tokens, edit=[]), "'edits'"),
        (lambda: lm(tokens).logit(answers=" a"), "'answer'"),
        (lambda: sae.ablate(feature=3), "'features'"),
        (lambda: sae.steer([3], amout=2.0), "'amount'"),
        (lambda: saejax.SiteEdit.steer(SITE, np.ones(4), ammount=2.0), r"SiteEdit.steer\(\) .* 'amount'"),
        (lambda: saejax.SAE.from_pretrained("a", sae="b"), "'sae_id'"),
        (lambda: acts.save("folder", heldout=1), "'held_out'"),
        (lambda: saejax.Graph.load(foldr="folder"), "'folder'"),
        (lambda: saejax.LocalModel(lm, sae, prompts="a text"), "'prompt'"),
        (lambda: JacobianLens(lm, {}, 1).save(pth="lens.pt"), "'path'"),
        (lambda: TemporalSAE.encode(None, x_xd=3), "'x_xD'"),
        (lambda: EffectsTable.select_prompts(None, behavior="sums"), "'behaviour'"),
    ):
        with pytest.raises(TypeError, match=right):
            call()
    with pytest.raises(TypeError, match=r"tokenize\(\) missing 1 required positional argument: 'texts'"):
        lm.tokenize()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda of: of.lm.tokenize(["a"], bos="sometimes"), "unknown bos 'sometimes': expected one of auto, al"),
        (lambda of: of.lm.with_bos("sometimes"), "unknown bos 'sometimes'"),
        (lambda of: of.lm.encode(None), "the text is None: expected one text"),
        (lambda of: of.lm.encode(["a"]), r"the text is \['a'\]: expected one text"),
        (lambda of: of.lm.lens([[5]], top=2.5), "top is 2.5: expected a whole number, 1 or more"),
        (lambda of: of.lm.unembed(np.zeros((1, 2, 3))), r"the stream has the shape \[1, 2, 3\]: expected \[B, T, "),
        (lambda of: of.sae.set([3], "x"), "the activation is 'x': expected a number, or 1 of them"),
        (lambda of: of.sae.redraw([3, 4], [np.ones(2)], 8), "there are 1 pools for 2 features: give one for each"),
        (lambda of: of.sae.redraw([3], [np.ones(2)], 0), "length is 0: expected a whole number, 1 or more"),
        (lambda of: of.sae.redraw([3], [np.ones(2)], 8, seed=-1), "seed is -1: expected a whole number, 0 or more"),
        (lambda of: saejax.SiteEdit.ablate(None), "the site is None: expected one such as resid_post.15"),
        (lambda of: saejax.capture(of.lm, TEXTS, []), "sites is empty: name some"),
        (lambda of: saejax.capture(of.lm, TEXTS, "attn_pattern.1"), "nothing edits, stores or trains on"),
        (
            lambda of: saejax.effects(of.lm, PROMPTS, mask(of.sae, [[3]]), batch_rows=0),
            "batch_rows is 0: expected 1 or more",
        ),
    ],
)
def test_arguments_that_methods_cannot_use_are_told_in_a_line(lm, sae, call, message):
    with pytest.raises(UserError, match=message):
        call(SimpleNamespace(lm=lm, sae=sae))


def test_few_prompts_or_edits_or_tokens_are_as_many(lm, sae):
    """No edits are the model itself; a prompt of one token and a single edit are a batch and a list."""
    tokens = lm.tokenize(TEXTS[:2])
    for none in ([], ()):
        np.testing.assert_array_equal(lm(tokens, edits=none).logits_BxTxV, lm(tokens).logits_BxTxV)
    one = lm([[5]], capture=SITE, edits=sae.ablate([3]))
    assert one.logits_BxTxV.shape[:2] == one.sites[SITE].shape[:2] == (1, 1)
    assert len(lm.generate([[5]], 3, edits=sae.ablate([3]))) == 1
    for nothing in ([], [[]], np.zeros((0, 3), int), None):
        for call in (lm, lambda ids: lm.generate(ids, 2), lm.lens):
            with pytest.raises(UserError, match="tokens (is an? |has an empty prompt)"):
                call(nothing)
    for edits in (None, [None], "x", {"a": 1}):
        with pytest.raises(UserError, match="edits has an? .*: expected edits such as"):
            lm(tokens, edits=edits)


def test_values_are_found_by_the_name_of_their_site(acts):
    assert acts[SITE] is acts.values[SITE]
    for call in (acts.__getitem__, acts.max_norm, acts.rows):
        with pytest.raises(UserError, match="unknown captured site 'resid_post.9': expected one of resid_post.1, "):
            call("resid_post.9")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "learning_rate"),
        ("learning_rte", "learning_rate"),
        ("l1_coefficient", "l1 or l1_by_depth"),
        ("steps", "max_steps or epochs"),
        ("d_sae", "features or expansion"),
        ("dict_size", "features or expansion"),
        ("adam_beta1", "b1"),
        ("lr_warm_up_steps", "warmup"),
        ("batch_size", "batch"),
    ],
)
def test_an_unknown_setting_is_told_with_the_nearest_ones(wrong, right):
    with pytest.raises(
        UserError, match=rf"unknown setting of TrainConfig '{wrong}': did you mean {right}.*\? expected one"
    ):
        make_config(TrainConfig, **{wrong: 1})


def test_captured_rows_are_the_models_own_values(lm, acts):
    for text in (0, 3, len(TEXTS) - 1):
        tokens = lm.tokenize([TEXTS[text]])
        rows_N = acts.index_Nx3[:, 0] == text
        for site, (expected_TxD,) in lm(tokens, capture=list(acts.values)).sites.items():
            np.testing.assert_allclose(acts[site][rows_N], expected_TxD, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(acts.index_Nx3[rows_N, 2], tokens.ids_BxT[0])
        np.testing.assert_array_equal(acts.index_Nx3[rows_N, 1], np.arange(tokens.lengths_B[0]))


def test_a_text_longer_than_the_context_is_split_as_the_flag_splits_it(lm):
    text = " ".join(TEXTS[:3])
    pieces = saejax.capture(lm, [text], SITE, context=8).texts
    front, whole = bos_tokens(lm.tokenizer), lm.tokenize([text])
    assert len(pieces) > 2 and {len(ids_T) for ids_T in pieces[:-1]} == {8}
    assert all(ids_T[: len(front)].tolist() == front for ids_T in pieces)
    text_T = np.concatenate([ids_T[len(front) :] for ids_T in pieces])
    np.testing.assert_array_equal(text_T, whole.ids_BxT[0, len(front) : whole.lengths_B[0]])
    table_Nx4 = np.zeros((3, len(COLUMNS)), np.int32)
    table_Nx4[2, COLUMNS.index("source")] = 1
    documents = Documents.contiguous(np.zeros(9, np.int32), [4, 4, 1], table_Nx4, ["text"])
    assert documents.describe() == "2 documents in 3 pieces of at most 4 tokens"
    assert documents.select(np.array([1, 2])).describe() == "2 documents"


def test_saved_activations_are_a_store(acts, tmp_path):
    store = acts.save(tmp_path / "store")
    rows = store.rows("train", SITE)
    row_of = {tuple(row): number for number, row in enumerate(acts.index_Nx3.tolist())}
    kept = [row_of[token] for token in zip(*(column.tolist() for column in store.tokens(rows)), strict=True)]
    np.testing.assert_array_equal(np.sort(kept), acts.rows(SITE))
    np.testing.assert_array_equal(store.read(SITE, rows), acts.values[SITE][kept])
    assert store.max_norm(SITE) == pytest.approx(acts.max_norm(SITE), rel=1e-6)
    assert store.documents[2].tolist() == acts.texts[2].tolist()
    store.verify()


def test_sinks_are_left_out(acts):
    values = {site: value_NxD.copy() for site, value_NxD in acts.values.items()}
    values[SITE][5] *= 1000.0
    spoiled = saejax.Activations(values, acts.index_Nx3, acts.texts, acts.sink_factor, acts.model, acts.bos)
    assert 5 not in spoiled.rows(SITE) and 5 in spoiled.rows("mlp_in.1") and 5 not in spoiled.rows()


def test_a_trained_dictionary_rebuilds_its_site(lm, acts, sae, clean_nats):
    x_NxD = acts.values[SITE]
    f_NxF = np.asarray(sae.encode(x_NxD))
    assert sae.site == SITE and f_NxF.shape[1] == 2 * x_NxD.shape[1] and (np.count_nonzero(f_NxF, axis=1) <= 8).all()
    scores = saejax.evaluate(lm, sae, TEXTS[:5])
    kept_N = np.isin(acts.index_Nx3[:, 0], range(5)) & (np.linalg.norm(x_NxD, axis=1) <= sae.config.max_norm)
    y_NxD, y_hat_NxD = x_NxD[kept_N].astype(np.float64), np.asarray(sae(x_NxD[kept_N]), np.float64)
    expected = 1 - np.square(y_NxD - y_hat_NxD).sum() / np.square(y_NxD - y_NxD.mean(axis=0)).sum()
    assert scores.explained_variance == pytest.approx(expected, abs=1e-5) and expected > 0.3
    assert scores.l0 == pytest.approx((f_NxF[kept_N] > 0).sum(axis=1).mean())
    assert scores.losses.tokens == len(clean_nats)
    assert scores.losses.ce["clean"] == pytest.approx(np.mean(clean_nats), rel=1e-5)
    assert scores.losses.kl["clean"] == pytest.approx(0.0, abs=1e-6)


def test_other_widths_are_refused(lm, sae):
    d = sae.config.d_in
    narrow = dataclasses.replace(sae.config, d_in=d - 1)
    other = saejax.Dictionary.initial(narrow, jax.random.key(0))
    for dictionary, mean_D, message in (
        (other, None, f"the dictionary has the width {d - 1}, but {SITE} of .* has {d}: give one of this model"),
        (sae, np.zeros(d + 1), f"mean_D has the width {d + 1}"),
    ):
        with pytest.raises(UserError, match=message):
            saejax.evaluate(lm, dictionary, TEXTS[:1], mean_D=mean_D)


@pytest.mark.slow  # test_crosscoder_stages.py compares the same scores
def test_a_crosscoder_is_trained_on_the_models_mesh_and_scored_at_all_its_parts(lm, acts, clean_nats):
    settings = dict(k=8, expansion=1, batch=64, max_steps=3, on_progress=lambda line: None)
    parts = (SITE, "mlp_out.1")
    crosscoder = saejax.train(acts, "+".join(parts), "batchtopk", mesh=lm.mesh, **settings)
    scores = saejax.evaluate(lm, crosscoder, TEXTS[:5])
    inside_N = np.isin(acts.index_Nx3[:, 0], range(5))
    for part, max_norm in zip(parts, crosscoder.config.max_norms, strict=True):
        inside_N &= np.linalg.norm(acts.values[part], axis=1) <= max_norm
    x_NxD = np.concatenate(
        [acts.values[part][inside_N] * scale for part, scale in zip(parts, crosscoder.config.scales, strict=True)], 1
    )
    error_NxD = x_NxD.astype(np.float64) - np.asarray(crosscoder(x_NxD))
    expected = 1 - np.square(error_NxD).sum() / np.square(x_NxD - x_NxD.mean(0, np.float64)).sum()
    assert scores.explained_variance == pytest.approx(expected, abs=1e-5)
    ce = scores.losses.ce
    assert ce["clean"] == pytest.approx(np.mean(clean_nats), rel=1e-5)
    assert ce["reconstructed"] != pytest.approx(ce["clean"], rel=1e-4)


def test_other_axes_and_no_eps_are_refused(acts):
    other = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(UserError, match="expected one with the axes member, data, model"):
        saejax.train(acts, SITE, mesh=other)
    with pytest.raises(UserError, match="eps is 0.0: expected at least"):
        saejax.train(acts, SITE, eps=0.0)


def test_a_folder_of_other_inputs_is_refused(acts, tmp_path):
    """Its dictionary would be returned in place of the one that is asked for."""
    settings = dict(k=4, expansion=1, batch=64, max_steps=1, on_progress=lambda line: None)
    saejax.train(acts, SITE, folder=tmp_path / "first", **settings)
    other = dataclasses.replace(acts, values={site: -value_NxD for site, value_NxD in acts.values.items()})
    with pytest.raises(UserError, match="first holds training with other activations: name another folder"):
        saejax.train(other, SITE, folder=tmp_path / "first", **settings)
    with pytest.raises(UserError, match="first holds training with other init_from"):
        saejax.train(acts, SITE, folder=tmp_path / "first", init_from=tmp_path / "first", **settings)


def test_what_cannot_be_trained_on(acts):
    def put(row, value, site=SITE):
        values = {site: value_NxD.copy() for site, value_NxD in acts.values.items()}
        values[site][row] = value
        return dataclasses.replace(acts, values=values)

    short = dataclasses.replace(acts, values={SITE: acts.values[SITE][1:]})
    for message, changed, settings in (
        (f"activations at {SITE} are NaN or infinite, first in row 5", put(5, np.nan), {}),
        (f"activations at {SITE} are NaN or infinite, first in row 7", put(7, np.inf), {}),
        ("expected one vector for each", short, {}),
        ("they have no covariance for whiten_error=0.5", put(slice(None), 1.0), dict(whiten_error=0.5)),
        ("takes no source: it trains on the activations that it is given", acts, dict(source="model")),
        ("takes no kinds: give kind=", acts, dict(kinds="topk")),
        ("takes no hook_name: give site=", acts, dict(hook_name="blocks.1.hook_resid_post")),
        ("takes no pretrained: use saejax.load_dictionary", acts, dict(kind="pretrained")),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            saejax.train(changed, SITE, batch=64, **settings)


def test_a_setting_without_effect_is_told(acts, caplog):
    for kind, settings, told in (("topk", dict(l1=0.1, k=8), "l1=0.1"), ("standard", dict(l1=0.1, k=8), "k=8")):
        caplog.clear()
        with pytest.raises(UserError, match="fewer than one batch"):  # before it trains
            saejax.train(acts, SITE, kind, batch=10**6, **settings)
        warnings = [record.message for record in caplog.records if "has no effect" in record.message]
        assert warnings == [f"{told} has no effect: dictionaries of the kind {kind} do not read it"]


QUICK = dict(random_sets=3, placebo_targets=3, baselines=(), untrained_dictionaries=0, bootstrap=100)


def test_prompts_of_a_file(lm, tmp_path):
    path = tmp_path / "own.jsonl"
    names = ("split", "text", "correct", "wrong")
    lines = [dict(zip(names, line, strict=True), behaviour="animal") for line in LINES]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert saejax.load_prompts(lm, path) == saejax.load_prompts(lm, str(path)) == PROMPTS
    for line in lines:
        del line["split"]
    path.write_text("\n".join(map(json.dumps, lines)))
    drawn = saejax.load_prompts(lm, path, train=3, test=2, seed=1)
    assert [prompt.split for prompt in drawn] == ["train"] * 3 + ["test"] * 2
    assert {prompt.text for prompt in drawn} == {prompt.text for prompt in PROMPTS}
    with pytest.raises(UserError, match="has 5 prompts of 'animal', but 80 train and 20 test"):
        saejax.load_prompts(lm, path)
    path.write_text("not a line\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        saejax.load_prompts(lm, path)


def test_dictionaries_go_to_other_tools(sae, tmp_path):
    saejax.export(tmp_path / "saelens", sae, "saelens")
    back = saejax.load_dictionary(tmp_path / "saelens")
    np.testing.assert_array_equal(back.W_dec_FxD[...], sae.W_dec_FxD[...])
    with pytest.raises(UserError, match="one by one"):
        saejax.export(tmp_path / "two", [sae, sae], "saelens")
    with pytest.raises(UserError, match="unknown format of a dictionary 'foo': expected one of saejax, saelens"):
        saejax.export(tmp_path, [], "foo")


def test_bad_input_is_said(lm, acts, sae):
    with pytest.raises(UserError, match="setting of TrainConfig"):
        saejax.train(acts, SITE, learning_rte=1)
    with pytest.raises(UserError, match=r"make 2 dictionaries \(k4, k8\), and this trains one"):
        saejax.train(acts, SITE, k=(4, 8), on_progress=pytest.fail)
    with pytest.raises(UserError, match="name the site"):
        saejax.train(acts)
    with pytest.raises(UserError, match="resid_post.9"):
        saejax.capture(lm, TEXTS, ["resid_post.9"])
    with pytest.raises(UserError, match="there are no prompts"):
        saejax.ablate(lm, sae, [])


def test_stacks_in_memory(lm, acts):
    settings = dict(k=(4, 8), expansion=(1, 2), batch=64, max_steps=1, on_progress=None, mesh=lm.mesh)
    stacks = saejax.train_all(acts, SITE, **settings)
    sizes = {name: (sae.config.n_features, sae.config.k) for name, sae in stacks.items()}
    assert sizes == {f"expansion{e}-k{k}": (64 * e, k) for e in (1, 2) for k in (4, 8)}


def test_a_dictionary_that_was_trained_in_parts_is_returned_in_parts(acts):
    """One that a device could not hold trains on several: nor may a device hold it afterwards."""
    settings = dict(k=4, expansion=2, batch=64, max_steps=1, on_progress=None)
    sae = saejax.train(acts, SITE, mesh=make_mesh(MeshConfig(model=8)), **settings)
    assert [array.data.shape for array in sae.W_dec_FxD[...].addressable_shards] == [(16, 64)] * 8


def test_pieces_of_a_text_stay_together(lm, sae, tmp_path):
    """Held-out text, halves and resamples are of texts: a text in both would judge what it has taught."""
    texts = [" ".join(TEXTS[:3]), TEXTS[3], " ".join(TEXTS[4:8])]
    acts = saejax.capture(lm, texts, SITE, context=8)
    sources = acts.sources_of_pieces()
    assert len(acts.texts) > 6 and np.unique(sources).tolist() == [0, 1, 2] and (np.diff(sources) >= 0).all()
    for source, text in enumerate(texts):
        of_text = np.concatenate([piece for piece, number in zip(acts.texts, sources, strict=True) if number == source])
        assert of_text.tolist() == lm.tokenize([text]).ids_BxT[0].tolist()
    documents = acts.save(tmp_path, held_out=1).documents
    np.testing.assert_array_equal(documents.split_N, documents.column("source") == 2)
    starts, lengths = documents.column("start"), documents.lengths_N
    same = np.diff(sources) == 0
    np.testing.assert_array_equal(np.diff(starts)[same], lengths[:-1][same])
    assert (starts[np.append(True, ~same)] == 0).all()
    # The first text begins with a special token of its own; later pieces begin with a BOS, 1.
    pieces = [np.array(ids) for ids in ([5, 7, 8], [1, 9, 4], [1, 3], [1, 2, 6], [1, 4])]
    values, text_N = {SITE: np.ones((13, lm.config.d_model))}, np.array([0, 0, 0, 1, 1])
    own = dataclasses.replace(acts, values=values, texts=pieces, bos=True, sources=text_N)
    assert own.save(tmp_path / "own").documents.column("start").tolist() == [0, 3, 5, 0, 2]
    for held_out in (3, -1):
        with pytest.raises(UserError, match=f"held_out is {held_out}: expected less than the number of texts"):
            acts.save(tmp_path / "other", held_out=held_out)
    with pytest.raises(UserError, match="there are 2 texts: give at least 3"):
        saejax.label_features(lm, saejax.capture(lm, texts[:2], SITE, context=8), sae)
    with pytest.raises(UserError, match="are of 3 texts: expected 5 at least"):
        saejax.group_features(acts, sae)
    with pytest.raises(UserError, match="of two texts at least"):
        saejax.match_features(sae, sae, "activity", acts=saejax.capture(lm, texts[:1], SITE, context=8))


def test_rule_labels_in_memory(lm, acts):
    """Each feature reads a dimension, which says whether a token is one of a few, in noise."""
    width, ids_N = acts.values[SITE].shape[1], np.concatenate(acts.texts)
    noise_NxD = np.random.default_rng(0).normal(0, 0.2, (len(ids_N), width))
    values_NxD = (np.eye(width)[ids_N % width] + noise_NxD).astype(np.float32)
    config = DictionaryConfig(kind="standard", site=SITE, d_in=width, n_features=width, centred=False)
    eye_DxD = np.eye(width, dtype=np.float32)
    arrays = dict(
        W_enc_DxF=eye_DxD, W_dec_FxD=eye_DxD, b_enc_F=np.full(width, -0.6, np.float32), b_dec_D=0 * eye_DxD[0]
    )
    found = saejax.label_features(
        lm, dataclasses.replace(acts, values={SITE: values_NxD}), Dictionary(config, **arrays)
    )
    assert found.counts.labelled == len(found.labels) > 5 * found.random.labelled
    for feature, label in found.labels.items():
        spelled = {lm.tokenizer.decode([token]).strip() for token in ids_N[ids_N % width == feature]}
        assert any(word and word in label.label for word in spelled)
    with pytest.raises(UserError, match="site of these activations"):
        saejax.label_features(lm, dataclasses.replace(acts, values=dict(mlp=values_NxD)), Dictionary(config, **arrays))


def test_every_program_is_a_stage_of_the_console_command_and_a_binary():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == dict(saejax="saejax.cli:main")
    binaries = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert binaries == set(cli.list_programs())
    assert set(all_stages()) - {"benchmark"} <= binaries  # which the baseline's program runs


def test_settings_of_another_type_are_refused():
    for settings, message in (
        (dict(k="x"), "k is 'x': expected a whole number"),
        (dict(k=2.5), "k is 2.5: expected a whole number"),
        (dict(k=True), "k is True: expected a whole number"),
        (dict(batch=None), "batch is None: expected a whole number"),
        (dict(learning_rate="fast"), "learning_rate is 'fast': expected a number"),
        (dict(k=()), "k is empty"),
        (dict(no_such=1), "unknown setting of TrainConfig 'no_such'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            make_config(TrainConfig, "topk", **settings)
    # Saved with results, as JSON.
    numbers = dict(k=np.int64(3), learning_rate=np.float32(0.5), zero_optimizer=np.bool_(True), init_from=Path("a"))
    saved = to_json(make_config(TrainConfig, "topk", **numbers))
    assert [saved[name] for name in numbers] == [[3], [0.5], True, "a"]


def test_errors_of_settings_name_keywords(acts):
    for settings, message in (
        (dict(k=65), "^k=65 is more than the 64 features: lower it"),
        (dict(kind="jumprelu", target_l0=5), "^target_l0=5 has no effect with l0_penalty=step: use"),
        (dict(site="resid_post.9"), r"^resid_post.9 of site is no site .* \(--capture.sites="),
    ):
        with pytest.raises(UserError, match=message):
            saejax.train(acts, **dict(site=SITE, features=64, on_progress=None) | settings)


def test_contexts_of_a_crosscoder(lm, acts, sae):
    site, d = f"{SITE}+resid_pre.0", sae.config.d_in
    both = dataclasses.replace(acts, values={SITE: acts.values[SITE], "resid_pre.0": acts.values[SITE][:, ::-1] + 1})
    config = DictionaryConfig(
        kind="topk", site=site, k=4, d_in=2 * d, n_features=64, widths=(d, d), scales=(0.5, 2.0), max_norms=(1e9, 1e9)
    )
    crosscoder = Dictionary.initial(config, jax.random.key(0))
    joined_NxD = np.concatenate([0.5 * both.values[SITE], 2 * both.values["resid_pre.0"]], axis=1)
    usable_N = np.intersect1d(both.rows(SITE), both.rows("resid_pre.0"))
    largest_F = np.asarray(crosscoder.encode(joined_NxD))[usable_N].max(axis=0)
    features = np.argsort(-largest_F)[:3].tolist()
    for feature, (first, *_) in saejax.top_contexts(lm, both, crosscoder, features).items():
        assert first["acts"][first["peak"]] == pytest.approx(largest_F[feature], rel=5e-3)
    matched, joined_NxF = saejax.match_features(crosscoder, crosscoder, acts=both), crosscoder.encode(joined_NxD)
    np.testing.assert_array_equal(matched.pairs.partner_F >= 0, np.asarray(joined_NxF)[usable_N].any(axis=0))
    with pytest.raises(UserError, match="is a site of a crosscoder, which .* expected one site of one model"):
        saejax.label_features(lm, both, crosscoder)


def test_contexts_matches_and_groups_in_memory(lm, acts, sae):
    """Against dense activations, and against itself with its features in another order."""
    (contexts,) = saejax.top_contexts(lm, acts, sae, [3], count=2).values()
    rows_N = acts.rows(SITE)
    f_N = np.asarray(sae.encode(acts.values[SITE][rows_N]))[:, 3]
    text, position, _ = acts.index_Nx3[rows_N[f_N.argmax()]]
    if f_N.max() > 0:
        assert contexts[0]["acts"][contexts[0]["peak"]] == pytest.approx(f_N.max(), rel=5e-3)
        before = lm.tokenizer.decode(acts.texts[text][max(0, position - 10) : position + 1])
        assert "".join(contexts[0]["tokens"][: contexts[0]["peak"] + 1]).strip() == before.strip()
    fired = int(np.asarray(sae.encode(acts.values[SITE])).max(axis=0).argmax())
    assert saejax.top_contexts(lm, acts, sae, fired) == saejax.top_contexts(lm, acts, sae, [fired]) != {fired: []}
    for features, message in (
        ([10**6], r"features \[1000000\] do not exist"),
        ([-1], "do not exist"),
        ("3", "features are"),
    ):
        for call in (
            lambda features: saejax.top_contexts(lm, acts, sae, features),
            lambda features: saejax.ablate(lm, sae, PROMPTS, features=features, **QUICK),
            lambda features: saejax.falsify(lm, sae, features, TEXTS, TEXTS),
        ):
            with pytest.raises(UserError, match=message):
                call(features)
    features = sae.config.n_features
    matched = saejax.match_features(sae, sae)
    np.testing.assert_array_equal(matched.pairs.partner_F, np.arange(features))
    np.testing.assert_allclose(matched.pairs.value_F, 1, atol=1e-5)
    first_text = acts.index_Nx3[:, 0] == 0  # without features that are silent there, as the stage leaves out dead ones
    few = dataclasses.replace(acts, values={SITE: acts.values[SITE][first_text]}, index_Nx3=acts.index_Nx3[first_text])
    fires_F = (np.asarray(sae.encode(few.values[SITE])) != 0).any(axis=0)
    live = saejax.match_features(sae, sae, acts=few)
    assert not fires_F.all() and ((live.pairs.partner_F >= 0) == fires_F).all()
    noise_NxD = (
        np.random.default_rng(0).normal(size=acts.values[SITE].shape).astype(np.float32)
    )  # no text returns in it
    made = dataclasses.replace(acts, values={SITE: noise_NxD})
    fires_NxF = np.asarray(sae.encode(noise_NxD)) != 0
    is_even_N = acts.index_Nx3[:, 0] % 2 == 0
    live_F = np.minimum(fires_NxF[is_even_N].sum(axis=0), fires_NxF[~is_even_N].sum(axis=0)) >= 20
    active = saejax.match_features(sae, sae, "activity", acts=made)
    assert live_F.any() and (active.pairs.partner_F[live_F] >= 0).all()
    np.testing.assert_allclose(active.pairs.value_F[live_F], 1, atol=1e-3)
    assert np.nanmean(active.null.value_F[live_F]) < 0.5
    with pytest.raises(UserError, match="compares activations: give acts="):
        saejax.match_features(sae, sae, "activity")
    assert np.nanmean(matched.null.value_F) < 0.9
    with pytest.raises(UserError, match="unknown kind of rows .bias."):
        saejax.match_features(sae, sae, by="bias")
    other = sae.with_config(dataclasses.replace(sae.config, site="resid_post.0"))
    with pytest.raises(UserError, match="unknown site of these activations 'resid_post.0'"):
        saejax.group_features(acts, other)
    for call, message in (
        (lambda: saejax.group_features(acts, sae, smallest=1), "smallest is 1: expected a whole number, 2 or more"),
        (lambda: saejax.group_features(acts, sae, resamples=0), "resamples is 0: expected a whole number, 1 or more"),
        (lambda: saejax.top_contexts(lm, acts, sae, fired, count=-1), "count is -1: expected a whole number, 1 or"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    feature_F, groups = saejax.group_features(acts, sae, resamples=2)
    assert len(groups.group_F) == len(feature_F) and len(groups.overlap_U) == groups.group_F.max(initial=-1) + 1
