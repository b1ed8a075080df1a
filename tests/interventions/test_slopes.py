"""Activation x gradient of every feature, against PyTorch's autograd and against the effects it estimates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import attribution_of_each

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions import slopes, split_model
from saejax.interventions.bases import Neurons
from saejax.interventions.controls import begins_answer
from saejax.interventions.edits import ZERO, ActivationReplacement, mask
from saejax.interventions.engine import run_edits
from saejax.interventions.rows import EditedRun, prompt_trees
from saejax.interventions.split_model import SplitModel
from saejax.models import decoder
from saejax.models.config import RunRules
from saejax.models.decoder import run_layers
from saejax.tasks.behaviours import Prompt

pytestmark = pytest.mark.usefixtures("few_shapes")


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


def assert_attributed(attribution_F, wanted_F, tolerance=1e-4):
    assert np.abs(wanted_F).max() > 0.01
    np.testing.assert_allclose(attribution_F, wanted_F, atol=tolerance * np.abs(wanted_F).max())


@pytest.mark.parametrize(
    "site", ["resid_post.1", *(pytest.param(some, marks=pytest.mark.slow) for some in ("mlp_in.1", "attn_out.2"))]
)
def test_attribution_equals_torch_autograd_and_relevance_its_rules(tiny, prompts, make_dictionary, plain, site):
    dictionary, few = make_dictionary(site), prompts[:4:2]
    split = SplitModel(tiny, dictionary)
    gradient_NxF = attribution_of_each(split, few)
    assert gradient_NxF.shape == (len(few), dictionary.config.n_features)
    split.point = dataclasses.replace(split.point, rules=RunRules(backward="relp"))
    relevance_NxF = attribution_of_each(split, few)
    for p in range(len(few)):
        run = plain(dictionary, few[p])
        assert_attributed(gradient_NxF[p], run.attribution())
        with run.relevance_rules():
            wanted_F = run.attribution()
        assert_attributed(relevance_NxF[p], wanted_F)
        assert np.abs(gradient_NxF[p] - wanted_F).max() > 0.05 * np.abs(wanted_F).max()


@pytest.mark.parametrize("kind", ["zero", pytest.param("counterpart", marks=pytest.mark.slow)])
def test_integrated_attributions_add_up_to_what_replacing_all_features_costs(tiny, pairs, dictionary, kind):
    split, few, source = SplitModel(tiny, dictionary), pairs[:3], ActivationReplacement(kind)
    runs = split.run(few, counterparts=kind == "counterpart")
    every = mask(dictionary, [range(dictionary.config.n_features)], replacement=source)
    clean_P, replaced_P = run_edits(split, runs, every)["logit_diff"]
    gradient_P, coarse_P, fine_P = (
        attribution_of_each(split, few, source=source, steps=n).sum(axis=1) for n in (0, 4, 16)
    )
    scale = np.abs(clean_P - replaced_P).max()
    np.testing.assert_allclose(fine_P, clean_P - replaced_P, atol=8e-3 * scale)
    errors = [np.abs(each - (clean_P - replaced_P)).max() for each in (gradient_P, coarse_P, fine_P)]
    assert errors[2] < errors[1] < errors[0]
    if kind == "zero":  # placebo targets are ranked by the same estimate
        alone = split.run(
            [prompt for prompt in few if (prompt.correct, prompt.wrong) == (few[0].correct, few[0].wrong)]
        )
        (score_1xF,) = slopes.target_attributions([split], [alone], alone[0].answers_Bx2[:1], source, steps=4)
        assert_attributed(slopes.attribution(split, alone, source, 4), score_1xF[0])


def test_with_counterparts_their_activations_stand_in(tiny, pairs, dictionary, plain):
    few = pairs[:3]
    split, source = SplitModel(tiny, dictionary), ActivationReplacement("counterpart")
    runs, attribution_NxF = split.run(few, counterparts=True), attribution_of_each(split, few, source=source)
    for p in range(0, len(few), 2):
        counterpart = plain(dictionary, dataclasses.replace(few[p], text=few[p].counterpart))
        assert_attributed(attribution_NxF[p], plain(dictionary, few[p]).attribution(counterpart))
    assert_attributed(slopes.attribution(split, runs, source), attribution_NxF.mean(axis=0))
    same = [dataclasses.replace(run, counterpart=run) for run in runs]
    assert np.abs(slopes.attribution(split, same, source)).max() < 1e-6 * np.abs(attribution_NxF).max()


@pytest.mark.parametrize("kind", ["mean", "random"])
def test_the_ranking_follows_the_replacement(tiny, prompts, dictionary, plain, kind):
    """(f - g) x gradient: of means g at every position that is read, of random draws their mean where f is not 0."""
    split, few = SplitModel(tiny, dictionary), prompts[:12]
    (run,) = split.run(few)
    # As the model computes them: what is nearly 0 there may be 0 in fp64, and is then not drawn.
    place_P = np.argsort(run.index_P)
    read_PxT = np.asarray(run.domain_BxT)[place_P]
    f_PxTxF = np.asarray(dictionary.encode(run.read_BxTxD), np.float64)[place_P] * read_PxT[:, :, None]
    f_NxF = f_PxTxF[read_PxT]
    fires_F, mean_F = (f_NxF != 0).sum(axis=0), f_NxF.mean(axis=0)
    source = ActivationReplacement("mean", mean_F=mean_F) if kind == "mean" else ActivationReplacement("random", seed=3)
    attribution_F, wanted_PxF = slopes.attribution(split, [run], source), []
    for p in range(len(few)):
        whole = plain(dictionary, few[p])
        gradient_TxF = whole.slopes() @ whole.W_dec_FxD.T
        f_TxF, read_Tx1 = f_PxTxF[p, : len(gradient_TxF)], read_PxT[p, : len(gradient_TxF), None]
        if kind == "mean":
            fall_TxF = (f_TxF - mean_F) * read_Tx1
        else:
            others_TxF = (f_NxF.sum(axis=0) - f_TxF) / np.maximum(fires_F - 1, 1)
            fall_TxF = np.where((f_TxF != 0) & (fires_F > 1), f_TxF - others_TxF, 0.0)
        wanted_F = (fall_TxF * gradient_TxF).sum(axis=0)
        wanted_PxF.append(wanted_F)
        assert np.abs(wanted_F - (f_TxF * gradient_TxF).sum(axis=0)).max() > 0.05 * np.abs(wanted_F).max()
    # Draws take their mean over the prompts of a run, so prompts are not compared one by one.
    assert_attributed(attribution_F, np.mean(wanted_PxF, axis=0), 2e-4)


def test_the_rules_change_no_value(tiny):
    tokens = tiny.tokenize(["The cat near the dogs"])
    model = tiny.config, tiny.params
    plain, again = (
        decoder.unembed(*model, run_layers(*model, decoder.embed(*model, tokens.ids_BxT), 0, 4, rules=rules).x, rules)
        for rules in (RunRules(), RunRules(backward="relp"))
    )
    np.testing.assert_allclose(again, plain, atol=2e-6 * np.abs(plain).max())


def test_tokens_begin_answers_whatever_their_code_points():
    """A tokenizer may write as one code point what the answer writes as two."""
    answers = [" E\u0301lan", " \uff11\uff12", "STRASSE"]
    for token in ("\u00c9l", " e\u0301", "1", "12", " stra\u00df"):
        assert begins_answer(token, answers), token
    assert not any(begins_answer(token, answers) for token in ("El", " 2", "rasse"))


def test_leaders_are_positive_and_in_order():
    attribution_F = np.array([0.1, -3.0, 0.5, 0.0, 0.2])
    assert slopes.leaders(attribution_F, 2) == [2, 4]
    assert slopes.leaders(attribution_F, 5) == [2, 4, 0]
    assert slopes.leaders(-np.abs(attribution_F), 3) == []


def test_a_gradient_that_is_not_finite(tiny, prompts, dictionary):
    arrays = dictionary.arrays
    arrays["W_dec_FxD"] = arrays["W_dec_FxD"].at[3].set(jnp.nan)
    split = SplitModel(tiny, Dictionary(dictionary.config, **arrays))
    with pytest.raises(UserError, match="gradient, is not finite at resid_post.1"):
        slopes.attribution(split, split.run(prompts[:2]))


@pytest.mark.parametrize("of", ["targets", pytest.param("answers", marks=pytest.mark.slow)])
def test_attribution_of_long_prompts(tiny, prompts, dictionary, monkeypatch, of):
    """Programs of a few prompts give what programs of 16 do."""
    split, targets = SplitModel(tiny, dictionary), np.array([[3, 5], [7, 11]])

    def measure(runs):
        if of == "answers":
            return slopes.attribution(split, runs)
        return slopes.target_attributions([split], [runs], targets)[0]

    wanted = measure(split.run(prompts[::4]))
    monkeypatch.setattr(split_model, "PROGRAM_TOKENS", 64)
    runs = split.run(prompts[::4])
    assert {len(run.last_B) % 16 for run in runs} != {0}
    assert_attributed(measure(runs), wanted)


@pytest.mark.parametrize(
    "positions", ["all", *(pytest.param(some, marks=pytest.mark.slow) for some in ("last", "1:3"))]
)
def test_prompts_that_begin_alike_share_tokens_and_change_no_mean(tiny, prompts, dictionary, positions):
    split, targets = SplitModel(tiny, dictionary, positions), np.array([[3, 5], [7, 11]])
    prompts = [*prompts[:4], *prompts[11:15]]  # of which two each begin alike
    runs = split.run(prompts)
    trees = [rows.tree for run in runs for rows in prompt_trees(split, EditedRun(run, ZERO), 4096)]
    real = sum(int(np.sum(run.last_B[: len(run.index_P)] + 1)) for run in runs)
    if positions == "all":
        distinct = [np.unique([np.ravel(tree.row_SxN), np.ravel(tree.column_SxN)], axis=1).shape[1] for tree in trees]
        assert sum(distinct) < 0.8 * real
    each_PxF = attribution_of_each(split, prompts)
    assert_attributed(slopes.attribution(split, runs), each_PxF.mean(axis=0))
    length = split.common_length(prompts)
    alone = [split.run([prompt], least=length) for prompt in prompts]
    alone_PxRxF = [slopes.target_attributions([split], [runs], targets)[0] for runs in alone]
    (target_RxF,) = slopes.target_attributions([split], [runs], targets)
    for r in range(len(targets)):
        assert_attributed(target_RxF[r], np.mean(alone_PxRxF, axis=0)[r])


def test_targets_together_have_the_slopes_of_each_alone_on_real_weights(smollm2):
    """16 targets of 256 tokens: of so many values XLA's default for CPUs makes all wrong but the first."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt("digits", "train", word + "".join(f" {digit}" for digit in rng.integers(0, 10, 16)), " 1", " 2")
        for word in ("one", "two", "red", "dog", "cat", "big", "hot", "sun")
    ]
    split = SplitModel(smollm2, Neurons(smollm2, smollm2.config.n_layers - 2))
    runs, targets = split.run(prompts), rng.integers(1000, 40000, (slopes.TARGETS, 2))
    trees = prompt_trees(split, EditedRun(runs[0], ZERO), slopes.TARGET_TOKENS)
    assert [rows.tree.row_SxN.size for rows in trees] == [256]
    (together_RxF,) = slopes.target_attributions([split], [runs], targets)
    for r in (5, 15):
        (alone_1xF,) = slopes.target_attributions([split], [runs], targets[r : r + 1])
        assert_attributed(together_RxF[r], alone_1xF[0])
