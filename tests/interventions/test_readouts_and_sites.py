"""Readouts of the user's and sets over several sites, beside ways of their own to the same numbers."""

import copy
import dataclasses
import functools
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import saejax
from saejax.dictionaries import Dictionary, DictionaryConfig, joined
from saejax.errors import UserError
from saejax.interventions import engine, slopes, steering
from saejax.interventions.edits import ZERO, mask, swap
from saejax.interventions.rows import EditedRun, prompt_trees
from saejax.interventions.several_sites import DirectionsAtSites, join_saes, place_at_sites
from saejax.interventions.slopes import attribution, leaders
from saejax.interventions.split_model import SplitModel
from saejax.interventions.table import TESTED, TEXT
from saejax.models.edits import SiteEdit
from saejax.models.split import Readout, ReadoutInputs

pytestmark = pytest.mark.usefixtures("few_shapes")
RIGHT, WRONG = " runs", " far"
SITES = ("resid_post.0", "mlp_out.2")
SETTINGS = dict(top=3, random_sets=6, untrained_dictionaries=1, baselines=("pca", "diff_means"), bootstrap=200)


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def asked(make_prompt):
    """10 train and 8 test prompts of two behaviours, which all have the same answers."""
    return [
        dataclasses.replace(
            make_prompt(i, "train" if i < 10 else "test", name, False), correct=RIGHT, wrong=WRONG, counterpart=""
        )
        for name in ("first", "second")
        for i in range(18)
    ]


def select(prompts, behaviour, split):
    return [prompt for prompt in prompts if (prompt.behaviour, prompt.split) == (behaviour, split)]


def test_a_readout_that_is_the_logit_difference_has_its_effects(tiny, dictionary, plain, asked):
    """Against runs of one prompt in PyTorch: the features, those of placebo readouts, and what each edit leaves."""
    right, wrong = (tiny.token_id(answer) for answer in (RIGHT, WRONG))
    pairs = [(7, 90), (120, 31)]
    found = saejax.ablate(
        tiny,
        dictionary,
        [dataclasses.replace(prompt, correct="", wrong="") for prompt in asked],
        readout=lambda logits_BxV: logits_BxV[:, right] - logits_BxV[:, wrong],
        placebo_readouts=[lambda logits, a=a, b=b: logits[:, a] - logits[:, b] for a, b in pairs],
        **SETTINGS,
    )
    table = found.table
    prompts = table.select_prompts("first")
    train = [plain(dictionary, prompt) for prompt in select(asked, "first", "train")]

    def choose(correct, wrong):
        runs = [dataclasses.replace(run, correct=correct, wrong=wrong) for run in train]
        return leaders(np.mean([run.attribution() for run in runs], axis=0), 3)

    (top, *_), chosen = table.select_edits("first", "top")[-1:], table.select_edits("first", "random")
    assert list(top.features) == choose(right, wrong)
    wanted = [choose(*pair) for pair in pairs]
    placebos = table.select_edits("first", "placebo")
    assert placebos and all(list(edit.features) in wanted for edit in placebos)
    for behaviour, edits in (("first", [top, *chosen, *placebos]), ("second", [top])):
        runs = [plain(dictionary, prompt) for prompt in select(asked, behaviour, "test")]
        got_ExP = table.values(edits, table.select_prompts(behaviour), "readout")
        want_ExP = [[run.ablated(edit.features, edit.fraction) for run in runs] for edit in edits]
        np.testing.assert_allclose(got_ExP, want_ExP, atol=2e-5)
        if behaviour == "first":
            clean_P = [run.diff(lambda x_TxD: x_TxD) for run in runs]
            np.testing.assert_allclose(table.clean_values(prompts, "readout"), clean_P, atol=2e-5)
    answers = found.verdict.dictionaries[TESTED]["first"]
    assert list(answers.ablation) == ["readout"] and not answers.bases.keys() - {"pca"}
    assert answers.ablation["readout"].effect.mean == pytest.approx(table.drops([top], prompts, "readout").mean())
    assert answers.random.numbers["sets"] == 6 and answers.trained.numbers["sets"] == 1
    assert answers.placebo.numbers["sets"] == len(placebos) and "p_shares" not in answers.placebo.numbers
    change_P = np.abs(table.drops([top], table.select_prompts("second"), "readout"))
    assert answers.selective.answer == "not tested", "there is no held-out text"
    assert np.isfinite(change_P).all()


@pytest.mark.parametrize("positions", ["last", pytest.param("all", marks=pytest.mark.slow)])
def test_a_readout_of_several_positions_equals_whole_runs(tiny, dictionary, plain, prompts, positions):
    """Edits at the last token alone: the tokens before it are read as they are without an edit."""
    some, sets = prompts[:6], [[3, 50], [8], [20, 51, 60]]

    def entropy(logits_BxCxV):
        logp = logits_BxCxV - jnp.log(jnp.exp(logits_BxCxV).sum(axis=-1, keepdims=True))
        return -(jnp.exp(logp) * logp).sum(axis=-1) @ jnp.array([1.0, 10.0, 100.0])

    split = SplitModel(tiny, dictionary, positions, readout=Readout((entropy,), 3))
    values_ExP = engine.run_edits(split, split.run(some), mask(split.dictionary, sets))["readout"]
    for p, prompt in enumerate(some):
        run = plain(dictionary, prompt)
        start = 0 if positions == "all" else len(run.ids_T) - 1
        for e, features in enumerate([[], *sets]):

            def change(x_1xTxD, run=run, features=features, start=start):
                x_TxD = x_1xTxD[0].numpy().copy()
                x_TxD[start:] -= (run.features(x_TxD)[:, features] @ run.W_dec_FxD[features])[start:]
                return torch.from_numpy(x_TxD)[None]

            with torch.no_grad():
                logp_CxV = torch.log_softmax(run.run(change)[-3:], dim=-1).numpy()
            wanted = -(np.exp(logp_CxV) * logp_CxV).sum(axis=1) @ [1.0, 10.0, 100.0]
            assert values_ExP[e, p] == pytest.approx(wanted, abs=2e-3), "of some 600"


def spread(output):
    """A readout of two layers, of queries and keys counted from both ends, and of logits."""
    shares_B = (
        output.attention(2, 1, -1, 0) + 0.5 * output.attention(3, 3, -3, -4) + 0.5 * output.attention(2, 0, -2, 1)
    )
    return shares_B + 0.01 * output.logits[:, -1, 7]


def plain_spread(run, change):
    """The same of one prompt in PyTorch, where the site's value [T, D] is changed."""
    model = copy.deepcopy(run.model)
    model.set_attn_implementation("eager")
    patterns = {}
    for layer in (2, 3):
        model.model.layers[layer].self_attn.register_forward_hook(
            lambda _, inputs, output, layer=layer: patterns.update({layer: output[1][0].numpy()})
        )
    logit = dataclasses.replace(run, model=model).logits(change)[7]
    return patterns[2][1, -1, 0] + 0.5 * (patterns[3][3, -3, -4] + patterns[2][0, -2, 1]) + 0.01 * logit


@pytest.mark.parametrize("positions", ["all", pytest.param("last", marks=pytest.mark.slow)])
def test_a_readout_of_attention_equals_whole_runs(tiny, dictionary, plain, prompts, positions):
    """Prompts of several lengths that begin alike, with edits at all tokens and at the last one alone."""
    some, sets = prompts[:6], [[3, 50], [8], [20, 51, 60]]
    split = SplitModel(tiny, dictionary, positions, readout=Readout((spread,), 3, (2, 3)))
    runs = split.run(some)
    values_ExP = engine.run_edits(split, runs, mask(split.dictionary, sets))["readout"]
    slope_F = attribution(split, runs)  # the mean over the prompts
    chosen = {3: [], int(np.argmax(np.abs(slope_F))): []}
    for p, prompt in enumerate(some):
        run = plain(dictionary, prompt)
        start = 0 if positions == "all" else len(run.ids_T) - 1

        def measure(features, share=1.0, run=run, start=start):
            def change(x_TxD):
                fall_TxD = run.features(x_TxD)[:, features] @ run.W_dec_FxD[features]
                return x_TxD - share * np.pad(fall_TxD[start:], ((start, 0), (0, 0)))

            return plain_spread(run, change)

        for e, features in enumerate([[], *sets]):
            assert values_ExP[e, p] == pytest.approx(measure(features), abs=2e-5)
        for feature, slopes_P in chosen.items():
            slopes_P.append((measure([feature], -0.01) - measure([feature], 0.01)) / 0.02)
    for feature, slopes_P in chosen.items():
        assert slope_F[feature] == pytest.approx(np.mean(slopes_P), abs=2e-5, rel=1e-3)
    assert np.abs(np.diff(values_ExP, axis=0)).max() > 1e-3 and np.abs(slope_F).max() > 3e-4


@pytest.mark.slow  # its readout is compared above, and the features of another one are judged
def test_features_that_move_attention_are_chosen_and_judged(tiny, dictionary, plain, asked):
    prompts = [dataclasses.replace(prompt, correct="", wrong="") for prompt in asked if prompt.behaviour == "first"]
    found = saejax.ablate(
        tiny,
        dictionary,
        prompts,
        readout=spread,
        readout_positions=3,
        readout_layers=[3, 2],
        placebo_readouts=[lambda output, key=key: output.attention(2, 1, -1, key) for key in (1, 4)],
        **SETTINGS | dict(untrained_dictionaries=0, baselines=()),
    )
    table, test = found.table, [prompt for prompt in asked if (prompt.behaviour, prompt.split) == ("first", "test")]
    (top,), placebos = table.select_edits("first", "top")[-1:], table.select_edits("first", "placebo")
    asked_of = table.select_prompts("first")
    clean_P, value_P = table.clean_values(asked_of, "readout"), table.values([top], asked_of, "readout")[0]
    features = list(top.features)
    for clean, value, prompt in zip(clean_P, value_P, test, strict=True):
        run = plain(dictionary, prompt)

        def ablate(x_TxD, run=run):
            return x_TxD - run.features(x_TxD)[:, features] @ run.W_dec_FxD[features]

        assert clean == pytest.approx(plain_spread(run, lambda x_TxD: x_TxD), abs=2e-5)
        assert value == pytest.approx(plain_spread(run, ablate), abs=2e-5)
    answers = found.verdict.dictionaries[TESTED]["first"]
    assert answers.ablation["readout"].effect.mean > 0 and placebos
    assert answers.placebo.numbers["sets"] == len(placebos) and answers.enough


def test_a_readout_finds_queries_and_keys_from_both_ends():
    pattern_BxHxCxT = np.random.default_rng(0).uniform(size=(2, 4, 3, 6)).astype(np.float32)
    inputs = ReadoutInputs(jnp.zeros((2, 3, 5)), {2: jnp.asarray(pattern_BxHxCxT)}, jnp.array([5, 3]))
    places_of = {(-1, 0): (0, 0), (-3, 2): (2, 2), (-2, -1): (5, 3), (-1, -4): (2, 0), (-1, 4): (4, None)}
    for (query, key), places in places_of.items():
        found_B = inputs.attention(2, 1, query, key)
        wanted_B = [0.0 if t is None else pattern_BxHxCxT[b, 1, query, t] for b, t in enumerate(places)]
        np.testing.assert_array_equal(found_B, wanted_B)
    assert inputs.attention(2, 1, -1, -5)[1] == 0.0 and inputs.keys[-1] == -5
    for place, message in (
        ((3, 0, -1, 0), "layer 3, and readout_layers names 2"),
        ((2, 4, -1, 0), "head 4 of layer 2, which has heads 0 to 3"),
        ((2, 0, -4, 0), "token -4: expected one of the last readout_positions, -3 to -1"),
        ((2, 0, 0, 0), "token 0: "),
    ):
        with pytest.raises(UserError, match=message):
            inputs.attention(*place)


@pytest.mark.slow  # a readout of attention is judged above
def test_the_example_of_the_page_about_edits_runs(tiny, dictionary, capsys):
    """With a layer of the tiny model, and without other dictionaries and bases, which the example does not choose."""
    text = (Path(__file__).parents[2] / "docs/edits.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "readout_layers" in code]
    quick = functools.partial(saejax.ablate, untrained_dictionaries=0, baselines=(), bootstrap=200)
    names = dict(saejax=types.SimpleNamespace(ablate=quick, make_prompts=saejax.make_prompts), lm=tiny, sae=dictionary)
    exec(example.replace("20", "3"), names)
    assert capsys.readouterr().out.strip() == names["found"].summary().strip()
    assert list(names["found"].verdict.dictionaries[TESTED]["capital"].ablation) == ["readout"]


@pytest.mark.slow
def test_many_placebo_readouts_take_the_memory_of_a_few(tiny, dictionary, prompts):
    """Slopes of one function at a time: each takes the logits of the whole vocabulary for all targets of a program."""

    def temporaries(count):
        functions = tuple(lambda logits, n=n: jnp.tanh(logits[:, n:]).sum(axis=1) for n in range(count))
        split = SplitModel(tiny, dictionary, readout=Readout(functions[:1]))
        (run,) = split.run(prompts[:8])
        (rows,) = prompt_trees(split, EditedRun(run, ZERO), 4096)
        targets_CxSxRx2 = np.broadcast_to(np.arange(16, dtype=np.int32)[:, None, None, None] % count, (16, 1, 8, 2))
        point, values = split.with_readout(Readout(functions)).point, rows.tree.take(run.value_BxTxD)
        arguments = split.params, split.past(run)[1], run.stream_BxTxX, values, rows, targets_CxSxRx2
        compiled = slopes.target_slopes.lower(point, *arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(5) < 1.1 * temporaries(2)


def test_readouts_that_cannot_be_used_are_refused(tiny, dictionary, asked):
    for options, message in (
        (dict(placebo_readouts=[lambda logits: logits[:, 0]]), "go with a readout"),
        (dict(readout="top1"), "a readout is 'top1': expected a function of the logits"),
        (dict(readout=lambda logits: logits.sum()), r"returns an array \[\] of logits"),
        (dict(readout=lambda logits: logits[:, 0, 0], readout_positions=0), "readout_positions is 0"),
        (dict(readout=lambda logits: logits[:, 0, 0], readout_positions=30), "takes the logits at 30 positions, and"),
        (dict(readout=lambda logits: logits[:, 0], effects="all"), "effects='all' ranks features by the logit"),
        (dict(readout_layers=[2]), "readout_layers go with a readout"),
        (dict(readout=spread, readout_layers=2), "readout_layers is one number: expected a list"),
        (dict(readout=spread, readout_layers=["2"]), "readout_layers is .'2'.: expected layers"),
        (dict(readout=spread, readout_layers=[True, 2]), "readout_layers is .True, 2.: expected layers"),
        (dict(readout=spread, readout_layers=[1]), "layer 1, which edits of resid_post.1 do not reach: .* 2 to 3"),
        (dict(readout=spread, readout_layers=[2, 9]), "attn_pattern.9: the model has 4 layers"),
        (
            dict(readout=lambda of: of.attention(2, 0, -1, -90), readout_layers=[2]),
            "to one of 90 tokens, and the prompt",
        ),
        (
            dict(readout=lambda of: of.attention(2, 0, -1, 40), readout_layers=[2]),
            "to one of 41 tokens, and the prompt",
        ),
        (
            dict(
                readout=lambda of: of.attention(2, 0, -1, 0),
                placebo_readouts=[lambda of, key=key: of.attention(2, 0, -1, key) for key in (1, 40)],
                readout_layers=[2],
            ),
            "a readout takes the attention to one of 41 tokens, and the prompt '",
        ),
        (dict(readout=lambda of: of.attention(2, 4, -1, 0), readout_layers=[2]), "head 4 of layer 2, .* heads 0 to 3"),
    ):
        with pytest.raises(UserError, match=message):
            saejax.ablate(tiny, dictionary, asked, **SETTINGS, **options)


def whole_run(runs, falls):
    """Return the logit difference where a fall [T, D] is subtracted at the site of each of some plain runs."""
    handles = []
    for run, fall_TxD in list(zip(runs, falls, strict=True))[1:]:
        kind, _, layer = run.dictionary.site.partition(".")
        block = run.model.model.layers[int(layer)]
        module = block.mlp if kind == "mlp_out" else block

        def lower(module, inputs, output, fall_TxD=fall_TxD):
            value = output[0] if isinstance(output, tuple) else output
            changed = value - torch.from_numpy(fall_TxD)[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(module.register_forward_hook(lower))
    diff = runs[0].diff(lambda x_TxD: x_TxD - falls[0])
    for handle in handles:
        handle.remove()
    return diff


def drop_slopes(found, falls_of, plains_of):
    """Return the attribution of the first, middle and last top feature, and the slope of small shares in whole runs."""
    top, features = found.top["first"], found.verdict.dictionaries[TESTED]["first"].features
    assert [effect.feature for effect in top] == list(features)
    for place in (0, len(top) // 2, -1):
        effect, feature = top[place], features[place]
        slopes_P = []
        for plains, falls in zip(plains_of, falls_of, strict=True):
            less, more = ([share * fall for fall in falls([feature])] for share in (0.01, -0.01))
            slopes_P.append((whole_run(plains, more) - whole_run(plains, less)) / 0.02)
        yield effect.attribution, np.mean(slopes_P)


def assert_equals_whole_runs(found, asked, plain, saes, falls_of):
    """Compare what an ablation at the sites of some SAEs measured with whole runs.

    ``falls_of(plains)`` takes the runs of a prompt, one for each site, and gives a function: what features add to each
    site, [T, D].
    """
    table = found.table
    top, chosen = table.select_edits("first", "top"), table.select_edits("first", "random")[:3]
    edits = [top[1], top[-1], *chosen]
    values_ExP = table.values(edits, table.select_prompts("first"), "logit_diff")
    clean_P = table.clean_values(table.select_prompts("first"), "logit_diff")
    for p, prompt in enumerate(select(asked, "first", "test")):
        plains = [plain(sae, prompt) for sae in saes]
        falls = falls_of(plains)
        assert clean_P[p] == pytest.approx(whole_run(plains, falls([])), abs=2e-5)
        for e, edit in enumerate(edits):
            each = [edit.fraction * fall_TxD for fall_TxD in falls(list(edit.features))]
            assert values_ExP[e, p] == pytest.approx(whole_run(plains, each), abs=2e-5)
    # An attribution is the slope of the effect of a small share of the feature.
    plains_of = [[plain(sae, prompt) for sae in saes] for prompt in select(asked, "first", "train")]
    for slope, wanted in drop_slopes(found, list(map(falls_of, plains_of)), plains_of):
        assert slope == pytest.approx(wanted, abs=5e-4)
        assert slope > 1e-2
    assert np.abs(values_ExP - clean_P).max() > 1e-2
    answers = found.verdict.dictionaries[TESTED]["first"]
    edits = [edit for group in ("random", "untrained") for edit in table.select_edits("first", group)]
    np.testing.assert_allclose(table.doses(edits, table.select_prompts("first")), answers.dose, rtol=1e-5)
    assert len(edits) == 20 and answers.random.p_value is not None and not answers.bases and not answers.enough


def test_features_of_several_sites_are_ablated_and_judged_together(tiny, make_dictionary, plain, asked):
    saes = [make_dictionary(site, seed=seed) for seed, site in enumerate(SITES)]
    prompts, count = [prompt for prompt in asked if prompt.behaviour == "first"], saes[0].config.n_features
    settings = SETTINGS | dict(top=8, random_sets=19, placebo_targets=8)
    # Whole texts run at all of the sites, too.
    found = saejax.ablate(tiny, saes[::-1], prompts, documents=[prompt.text for prompt in prompts[:2]], **settings)
    table, (top,) = found.table, found.table.select_edits("first", "top")[-1:]  # the whole change
    texts = table.select_prompts(TEXT)
    assert np.abs(table.values([top], texts, "ce") - table.clean_values(texts, "ce")).max() > 1e-4
    assert len({feature // count for feature in top.features}) == 2

    def falls_of(plains):
        values = [run.value() for run in plains]
        usable_T = np.logical_and(*(run.is_usable(x_TxD) for run, x_TxD in zip(plains, values, strict=True)))
        acts = [run.features(x_TxD) * usable_T[:, None] for run, x_TxD in zip(plains, values, strict=True)]

        def falls(features):
            each = [[f - n * count for f in features if f // count == n] for n in (0, 1)]
            return [f_TxF[:, e] @ run.W_dec_FxD[e] for run, f_TxF, e in zip(plains, acts, each, strict=True)]

        return falls

    assert_equals_whole_runs(found, asked, plain, saes, falls_of)
    # Each site counts by how large its values are.
    joint = join_saes(tiny, saes[::-1], [prompt.text for prompt in select(asked, "first", "train")])
    assert [sae.site for sae in joint.saes] == list(SITES)
    (norm_P,) = table.values([top], table.select_prompts("first"), "change_norm")
    for norm, prompt in zip(norm_P, select(asked, "first", "test"), strict=True):
        falls = falls_of([plain(sae, prompt) for sae in saes])(list(top.features))
        relative = [np.linalg.norm(fall_TxD) / norm for fall_TxD, norm in zip(falls, joint.norms, strict=True)]
        assert norm == pytest.approx(joint.norms[0] * np.linalg.norm(relative), rel=1e-4)
    for bad, message in (([saes[0], saes[0]], "expected a different site for each"), ([], "no dictionary")):
        with pytest.raises(UserError, match=message):
            saejax.ablate(tiny, bad, prompts, **SETTINGS)
    with pytest.raises(UserError, match="neither repeats nor error='drop'"):
        saejax.ablate(tiny, saes, prompts, error="drop", **SETTINGS)
    for features, message in (([1.5], "expected whole numbers"), ([2 * count], f"there are 0 to {2 * count - 1}")):
        with pytest.raises(UserError, match=message):
            saejax.ablate(tiny, saes, prompts, features=features)


@pytest.fixture(scope="module")
def crosscoder(tiny):
    """A random crosscoder whose parts are not in the order of the model."""
    widths = (tiny.config.d_model,) * 2
    config = DictionaryConfig(
        kind="topk", k=12, site="+".join(SITES[::-1]), d_in=sum(widths), n_features=96, widths=widths,
        scales=(0.7, 1.9),
    )  # fmt: skip
    return Dictionary.initial(config, jax.random.key(5)).with_sink_norms(tiny.sink_norm)


def test_features_of_a_crosscoder_are_ablated_and_judged_at_all_of_its_sites(
    tiny, make_dictionary, asked, plain, crosscoder
):
    prompts = [prompt for prompt in asked if prompt.behaviour == "first"]
    assert [part.site for part in place_at_sites(tiny, crosscoder, prompts[:1]).parts] == list(SITES)
    assert place_at_sites(tiny, made := make_dictionary(SITES[0]), prompts) is made
    found = saejax.ablate(tiny, crosscoder, prompts, **SETTINGS | dict(top=8, random_sets=19, placebo_targets=0))
    saes = [make_dictionary(site, seed=seed) for seed, site in enumerate(SITES)]  # of which the sites alone are read
    rows = joined.unjoin(crosscoder.config, np.asarray(crosscoder.W_dec_FxD, np.float64))

    def falls_of(plains):
        values = {site: np.asarray(run.value(), np.float32) for site, run in zip(SITES, plains, strict=True)}
        x_TxD = joined.join(crosscoder.config, values)
        f_TxF = np.asarray(crosscoder.encode(x_TxD)) * np.asarray(joined.is_not_sink(crosscoder.config, x_TxD))[:, None]
        return lambda features: [f_TxF[:, features] @ rows[site][features] for site in SITES]

    assert_equals_whole_runs(found, asked, plain, saes, falls_of)
    with pytest.raises(UserError, match="neither repeats nor error='drop'"):
        saejax.ablate(tiny, crosscoder, prompts, error="drop", **SETTINGS)
    for part, said in (
        (f"other:{SITES[0]}", f"reads other:{SITES[0]}, a site of a second model"),
        ("attn_z.1", "reads attn_z.1, which lies within attention or the MLP"),
        ("mlp_act.1", "reads mlp_act.1, which lies within attention or the MLP: .*, resid_pre, attn_out"),
    ):
        other = crosscoder.with_config(dataclasses.replace(crosscoder.config, site=f"{SITES[0]}+{part}"))
        with pytest.raises(UserError, match=said):
            saejax.ablate(tiny, other, prompts, **SETTINGS)


def logit_diffs(tiny, prompts, edits):
    """Runs of the whole model."""
    tokens = tiny.tokenize([prompt.text for prompt in prompts])
    logits_BxV = np.asarray(tiny(tokens, edits=edits).logits_BxTxV)[np.arange(len(prompts)), tokens.last_B]
    return logits_BxV[:, tiny.token_id(RIGHT)] - logits_BxV[:, tiny.token_id(WRONG)]


def test_steering_by_features_of_a_crosscoder_changes_all_of_its_sites(tiny, asked, crosscoder):
    """Features are chosen by the slopes of all sites; what is added or clamped equals an edit of the crosscoder."""
    train, tests = (select(asked, "first", split) for split in ("train", "test"))
    train = [
        dataclasses.replace(prompt, correct=WRONG, wrong=RIGHT) if n % 2 else prompt for n, prompt in enumerate(train)
    ]
    split = SplitModel(tiny, place_at_sites(tiny, crosscoder, train))
    texts = steering.AnswerTexts.read(tiny, split, train)
    tokens = tiny.tokenize([prompt.text for prompt in train])
    at = np.arange(len(train)), tokens.last_B
    values = {site: np.asarray(value) for site, value in tiny(tokens, capture=list(SITES)).sites.items()}
    joined_BxTxD = joined.join(crosscoder.config, values)
    np.testing.assert_allclose(texts.f_NxF, np.asarray(crosscoder.encode(joined_BxTxD))[at], atol=1e-5)
    counts_BxT = np.asarray(joined.is_not_sink(crosscoder.config, joined_BxTxD)) & tokens.mask_BxT
    norms = [np.sqrt((np.linalg.norm(values[site], axis=-1)[counts_BxT] ** 2).mean()) for site in SITES]
    relative = np.concatenate([values[site] * norms[0] / norm for site, norm in zip(SITES, norms, strict=True)], -1)
    np.testing.assert_allclose(texts.value_NxD, relative[at], rtol=2e-4, atol=1e-5)
    assert texts.norm == pytest.approx(np.linalg.norm(relative, axis=-1)[counts_BxT].mean(), rel=1e-4)
    rows = joined.unjoin(crosscoder.config, np.asarray(crosscoder.W_dec_FxD))
    turned = steering.AnswerSwap(*map(tiny.token_id, (RIGHT, WRONG)))
    slope_F = sum(
        rows[site] @ texts.mean_difference(slopes.slopes(tiny, train, "logit_diff", site)[at], turned) for site in SITES
    )
    rise_F = texts.mean_difference(texts.f_NxF, turned)
    top = texts.top(turned, 4)
    assert len(top) == 4 and top == np.argsort(-rise_F * slope_F)[:4].tolist()
    clean = logit_diffs(tiny, tests, [])
    for method, strength in (("add", 0.5), ("clamp", 2.0)):
        edits = steering.steering_edits(texts, split.dictionary, method, turned, top, [strength])
        placed = split if method == "clamp" else SplitModel(tiny, edits.dictionary)
        found = engine.run_edits(placed, placed.run(tests), edits)["logit_diff"]
        multiple = strength * texts.norm / np.linalg.norm(rise_F[top] @ texts.W_dec_FxD[top])
        change = (
            crosscoder.set(top, strength * texts.f_NxF[texts.answer_N == turned.target][:, top].mean(axis=0))
            if method == "clamp"
            else crosscoder.steer(top, multiple * rise_F[top])
        )
        np.testing.assert_allclose(found[0], clean, atol=2e-5)
        np.testing.assert_allclose(found[1], logit_diffs(tiny, tests, [change]), atol=5e-5)
        assert np.abs(found[1] - clean).max() > 1e-2
    found = saejax.steer(tiny, crosscoder, [*train, *tests], top=4, doses=(0.5,), random_sets=2, bootstrap=100)
    assert set(found) == {"first"}


def test_all_sites_of_a_crosscoder_take_the_counterparts_values(tiny, asked, crosscoder):
    """The ceiling of patched features: the first site's value, and at the later one what differs between the texts."""
    tests = [
        dataclasses.replace(prompt, counterpart=prompt.text.replace(" near ", " that "))
        for prompt in select(asked, "first", "test")
    ]
    split = SplitModel(tiny, place_at_sites(tiny, crosscoder, tests))
    width = split.dictionary.config.d_in
    every = SplitModel(tiny, DirectionsAtSites(split.dictionary, np.eye(width)))
    edits = swap(every.dictionary, [range(width)])
    found = engine.run_edits(every, every.run(tests, counterparts=True), edits)["logit_diff"]
    texts = [prompt.text for prompt in tests], [prompt.counterpart for prompt in tests]
    (clean, tokens), (other, _) = (
        (tiny(tokens := tiny.tokenize(side), capture=list(SITES)).sites, tokens) for side in texts
    )
    counts_BxTx1 = np.asarray(joined.is_not_sink(crosscoder.config, joined.join(crosscoder.config, clean)))[..., None]
    change = {site: counts_BxTx1 * (np.asarray(other[site]) - np.asarray(clean[site])) for site in SITES}
    patched = SiteEdit.patch(SITES[0], np.asarray(clean[SITES[0]]) + change[SITES[0]])
    # What the first site's change makes of the later site, and the later site's own change.
    below = np.asarray(tiny(tokens, edits=[patched], capture=[SITES[1]]).sites[SITES[1]])
    wanted = logit_diffs(tiny, tests, [patched, SiteEdit.patch(SITES[1], below + change[SITES[1]])])
    np.testing.assert_allclose(found[1], wanted, atol=5e-5)
    assert np.abs(found[1] - found[0]).max() > 1e-2
