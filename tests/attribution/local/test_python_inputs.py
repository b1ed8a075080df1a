"""What callers from Python write for edits, prompts and targets: what is meant is taken, all else is one clear line."""

import jax.numpy as jnp
import numpy as np
import pytest
from made_transcoders import IDS, made_sae, made_set

import saejax
from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.attribution.trace.gradient import SaeRun
from saejax.errors import UserError
from saejax.models.tokens import pad

P = "The cat near the dogs runs."


@pytest.fixture(scope="module")
def transcoders(lm):
    return made_set(lm)


@pytest.fixture(scope="module")
def local(lm, transcoders):
    return LocalModel(lm, transcoders, IDS)


@pytest.fixture(scope="module")
def change(local):
    active = local.active
    return Change(*(int(array[5]) for array in (active.layer_A, active.position_A, active.feature_A)), 0.0)


def test_edits_that_mean_one_change(local, change):
    expected_RxV = local.run([[change]]).logits_RxV
    layer, position, feature, value = change
    numbers = Change(np.int64(layer), jnp.int32(position), np.int32(feature), np.float32(value))
    for edits in (
        change,
        ((change,),),
        iter([[change]]),
        [[numbers]],
        [[Change(layer, slice(position, position + 1), feature, 0)]],
    ):
        np.testing.assert_array_equal(local.run(edits).logits_RxV, expected_RxV)
    np.testing.assert_array_equal(saejax.intervene(local, change), expected_RxV)
    texts = [local.generate(changes, 2).ids_N.tolist() for changes in ([change], change, (change,))]
    assert texts[0] == texts[1] == texts[2] == local.generate_rows(change, 2, on_progress=None)[0].ids_N.tolist()
    assert len(repr(local)) < 200 and len(repr(local.run(change)).splitlines()) < 10


def test_edits_that_are_none(local, change):
    for edits in (None, 3, "abc", [change], [None], {"a": 1}, [[tuple(change)]]):
        with pytest.raises(UserError, match="edits are rows of changes that are made together"):
            local.run(edits)
    for wrong, said in {
        (0, 99.5, change.feature, 0.0): "position 99.5: this prompt has the positions 0 to 5",
        (0, (1, 2), change.feature, 0.0): r"position \(1, 2\): this prompt has",
        (0, -1, change.feature, 0.0): "position -1: this prompt has",
        (1.5, 1, change.feature, 0.0): "feature .* of layer 1.5 cannot be set",
        (0, 1, change.feature, None): "cannot be set to None",
        (0, 1, change.feature, "3"): "cannot be set to '3'",
        (0, 1, change.feature, True): "cannot be set to True",
        (False, 1, change.feature, 2.0): "feature .* of layer False cannot be set",
        (0, True, change.feature, 0.0): "position True: this prompt has",
    }.items():
        with pytest.raises(UserError, match=said):
            local.run([[Change(*wrong)]])
    for features in (3, [-1], [10**6], [0.5]):
        with pytest.raises(UserError, match="expected a list of places in the active features"):
            local.run(change, features=features)


def test_changes_of_nothing_are_counted(local, change, caplog):
    """No feature is used at the first token, where setting one to 0 is no change, and to another number is one."""
    at_first, clean_V = Change(0, 0, 3, 0.0), local.run([[]]).logits_RxV[0]
    for rows, told in (
        ([[at_first], [change], [at_first, change], []], "1 of 3 rows of changes change nothing"),
        ([[at_first._replace(position=slice(0, 1))]], "1 of 1 rows"),
        ([[at_first._replace(value=2.0)], [at_first._replace(position=slice(0, 2))]], ""),
    ):
        caplog.clear()
        logits_RxV = local.run(rows).logits_RxV
        assert told in caplog.text if told else not caplog.text
        if told:
            np.testing.assert_allclose(logits_RxV[0], clean_V, atol=1e-5)
    local.generate(at_first, 2)
    assert caplog.text.count("change nothing") == 1


def test_places_without_features_by_their_norm_are_counted(lm, transcoders, change, caplog):
    layer, position = change[:2]
    read_TxD = lm(pad([IDS]), capture=[f"mlp_in.{layer}"]).sites[f"mlp_in.{layer}"][0]
    norm_T = np.linalg.norm(np.asarray(read_TxD), axis=-1)
    low = [dictionary.with_sink_norms(lambda site: 1e9, replace=True) for dictionary in transcoders]
    limit = float(norm_T[position]) * 0.999
    low[layer] = low[layer].with_sink_norms(lambda site: limit, replace=True)
    count = int((norm_T[1:] > limit).sum())
    assert 0 < count < 5
    local = LocalModel(lm, low, IDS)
    assert f"{count} of {5 * lm.config.n_layers} places of the prompt (layer and token after the first)" in caplog.text
    assert (layer, position) not in {(at, place) for at, place, _ in local.active.index_of}
    for value, is_told in ((0.0, True), (2.0, False)):
        caplog.clear()
        local.run(Change(layer, position, change.feature, value))
        assert ("1 of 1 rows of changes change nothing" in caplog.text) == is_told


def test_settings_of_generated_texts(local, change):
    greedy = local.generate(change, 3).ids_N
    np.testing.assert_array_equal(local.generate(change, np.int64(3), temperature=1e-300).ids_N, greedy)
    for wrong, said in (
        (dict(max_new_tokens=2.5), "max_new_tokens 2.5"),
        (dict(max_new_tokens="3"), "max_new_tokens 3"),
        (dict(temperature="1"), "temperature is '1'"),
        (dict(temperature=None), "temperature is None"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=None), "seed is None"),
    ):
        with pytest.raises(UserError, match=said):
            local.generate(**dict(changes=change, max_new_tokens=3, temperature=1.0) | wrong)


def test_prompts_and_targets(lm, transcoders):
    def labels(prompt=P, dictionaries=transcoders, **options):
        return saejax.trace(lm, dictionaries, prompt, **dict(max_features=4, max_logits=1) | options).labels

    assert labels(lm.tokenize([P]), targets=[" cat"]) == labels(targets=" cat") == (" cat",)
    assert labels(np.array(IDS, np.uint32)) == labels(IDS)
    assert labels(targets=np.int32(5)) == labels(targets=jnp.int32(5)) == labels(targets=[jnp.int32(5)])
    # As they are: pages show the line break and the quotes as those of single tokens.
    assert labels(targets=[("\n", "'"), (lm.tokenizer.encode("é")[0], 5)]) == ("'\n' - \"'\"", r"'\xc3' - '%'")
    for options, said in (
        (dict(prompt=[-5, 7]), "token ids are -5 to 7"),
        (dict(prompt=None), "the prompt is None: expected a text"),
        (dict(prompt=pad([IDS, IDS])), "the prompt is the tokens of 2 texts"),
        (dict(targets=None), "targets is None: expected a token"),
        (dict(targets=1.5), "targets is 1.5: expected a token"),
        (dict(targets=[(5, True)]), "the target token True does not exist"),
        (dict(targets=saejax.Direction("texts", ["1"] * 64)), "the direction 'texts' has no numbers: expected"),
        (dict(prompt=[3, True]), r"the prompt is \[3, True\]: expected a text"),
        (
            dict(targets=saejax.Direction(3, np.ones(64))),
            "the direction 3 has .* expected a text as its name",
        ),
        (dict(targets=saejax.Direction("nothing", np.zeros(64))), "'nothing' .* 64 finite numbers, not all 0"),
        (dict(targets=[(saejax.Direction("d", np.ones(64)), 5)]), r"the target token Direction\(name='d'"),
        (dict(logit_mass=None), "logit_mass None"),
        (
            dict(dictionaries=transcoders[0]),
            "dictionaries is a Dictionary: expected a list of results",
        ),
        (dict(dictionaries=dict(enumerate(transcoders))), "dictionaries is a dict: expected a list"),
        (dict(dictionaries=None), "dictionaries is None: expected a list"),
        (dict(dictionaries=[made_sae(lm, "resid_post.1", IDS)]), r"resid_post.1 is an SAE, .* saejax.open_saes"),
    ):
        with pytest.raises(UserError, match=said):
            labels(**options)


def test_saes_that_are_none():
    for saes in (None, 3):
        with pytest.raises(UserError, match=f"saes is {saes}: expected dictionaries, or their folders"):
            saejax.open_saes(saes)


def test_a_run_with_saes_takes_the_same_edits(lm):
    run = SaeRun.of(lm, saejax.open_saes(made_sae(lm, "resid_post.1", IDS)), np.array(IDS, np.int32))
    feature = Change(1, int(run.active.position_A[0]), int(run.active.feature_A[0]), 0.0)
    np.testing.assert_array_equal(run.run(feature).logits_RxV, run.run([[feature]]).logits_RxV)
    with pytest.raises(UserError, match="edits are rows of changes"):
        run.run([feature])


def test_calls_of_a_model(lm):
    tokens, alone = lm.tokenize([P, "3 + 4 ="]), lm.tokenize([P])
    for texts in (iter([P]), (P,), np.array([P])):
        np.testing.assert_array_equal(lm.tokenize(texts).ids_BxT, alone.ids_BxT)
    assert lm.generate(alone, np.int64(2)) == lm.generate(alone, 2)
    assert lm(alone).logit(jnp.int32(5)) == lm(alone).logit(np.int64(5)) == lm(alone).logit(5)
    for call, said in (
        (lambda: lm.tokenize(None), "texts is None: expected a list of texts"),
        (lambda: lm.tokenize(iter([])), "there are no texts"),
        (lambda: lm(tokens, capture=None), "capture has None: expected sites such as"),
        (lambda: lm(tokens).logit(1.5), "the answer is 1.5: expected a token's id"),
        (lambda: lm(tokens).logit([5]), r"the answer is \[5\]"),
        (lambda: lm.generate(tokens, 2.5), "max_new_tokens is 2.5: expected a whole number"),
        (lambda: lm.generate(tokens, "3"), "max_new_tokens is '3'"),
        (lambda: lm.generate(tokens, 2, stop=None), "stop is None: expected a list of strings"),
        (lambda: lm.generate(tokens, 2, stop=[3]), r"stop is \[3\]"),
        (lambda: lm.generate(tokens, 2, temperature=1.0, seed=2**70), "of at most 64 bits"),
    ):
        with pytest.raises(UserError, match=said):
            call()
