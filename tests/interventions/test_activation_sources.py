"""What stands in place of removed features: against a plain loop with PyTorch hooks, and what must change nothing."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import ablate_sets

from saejax.errors import UserError
from saejax.interventions import activity
from saejax.interventions import engine as ablation
from saejax.interventions.edits import WORDS, ActivationReplacement
from saejax.interventions.split_model import SplitModel
from saejax.settings import REPLACEMENTS

SETS = [[3], [40], [7, 90, 120], list(range(0, 160, 2))]


@pytest.fixture(scope="module")
def pairs(prompts):
    """Prompts with counterparts of as many tokens: those of other subjects."""
    few = prompts[:11]
    return [dataclasses.replace(prompt, counterpart=few[p - 1].text) for p, prompt in enumerate(few)]


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def split(tiny, dictionary):
    return SplitModel(tiny, dictionary)


def same_lengths(tiny, pairs):
    """Counterparts cut or repeated to the prompts' lengths, which the words' tokens decide."""
    ids = tiny.tokenize([pair.text for pair in pairs]).lengths_B
    by_length = {}
    for pair, length in zip(pairs, ids, strict=True):
        by_length.setdefault(int(length), []).append(pair.text)
    return [
        dataclasses.replace(pair, counterpart=by_length[int(length)][0])
        for pair, length in zip(pairs, ids, strict=True)
    ]


def activations(split, dictionary, run):
    """f [B, T, F] of a clean run, 0 outside the domain, in fp64."""
    f_BxTxF = np.asarray(dictionary.encode(run.value_BxTxD), np.float64)
    return f_BxTxF * np.asarray(run.domain_BxT)[:, :, None]


def plain_effects(split, run, W_dec_FxD, changed_BxTxF, sets):
    """The tail of the whole prompts with the activations changed, set by set."""
    found = []
    for chosen in sets:
        removed = np.zeros_like(changed_BxTxF)
        removed[:, :, chosen] = changed_BxTxF[:, :, chosen]
        value = jnp.asarray(np.asarray(run.value_BxTxD, np.float64) - removed @ W_dec_FxD, jnp.float32)
        end_BxTxD = split.point.run_suffix(split.params, run.stream_BxTxD, value)
        diff_B = split.point.logit_difference(split.params, end_BxTxD, run.last_B, run.answers_Bx2)
        found.append(np.asarray(diff_B)[: len(run.index_P)])
    return np.array(found)


def test_every_kind_is_described():
    assert tuple(WORDS) == REPLACEMENTS


def test_means(split, dictionary, pairs):
    (run,) = split.run(pairs)
    mean_F = activity.statistics(split, [run]).mean_F
    kept = slice(0, len(run.index_P))
    f_BxTxF, domain_BxT = activations(split, dictionary, run), np.asarray(run.domain_BxT)
    np.testing.assert_allclose(mean_F, f_BxTxF[kept].sum((0, 1)) / domain_BxT[kept].sum(), rtol=1e-4)
    changed_BxTxF = (f_BxTxF - mean_F) * domain_BxT[:, :, None]
    wanted_SxP = plain_effects(split, run, np.asarray(dictionary.W_dec_FxD, np.float64), changed_BxTxF, SETS)
    diffs = ablate_sets(split, [run], SETS, source=ActivationReplacement("mean", mean_F=mean_F))
    np.testing.assert_allclose(diffs.ablated_SxP[:, run.index_P], wanted_SxP, atol=1e-4)
    assert np.abs(diffs.drop_SxP).max() > 0.05


def test_counterparts(tiny, split, dictionary, pairs):
    pairs = same_lengths(tiny, pairs)
    (run,), (other,) = split.run(pairs), split.run_counterparts(pairs)
    changed_BxTxF = activations(split, dictionary, run) - activations(split, dictionary, other)
    changed_BxTxF *= np.asarray(run.domain_BxT)[:, :, None]
    wanted_SxP = plain_effects(split, run, np.asarray(dictionary.W_dec_FxD, np.float64), changed_BxTxF, SETS)
    diffs = ablate_sets(split, [run], SETS, source=ActivationReplacement("counterpart"), counterparts=[other])
    np.testing.assert_allclose(diffs.ablated_SxP[:, run.index_P], wanted_SxP, atol=1e-4)
    assert np.abs(diffs.drop_SxP).max() > 0.05


def test_a_prefix_is_shared_where_that_of_the_counterpart_is_too():
    prefix_PxT, other_PxT = np.array([[0, 1, 1], [0, 2, 2], [0, 1, 0]]), np.array([[0, 0, 2], [2, 0, 0], [0, 0, 2]])
    runs = [types.SimpleNamespace(prefix_PxT=number_PxT, last_B=np.zeros(3)) for number_PxT in (prefix_PxT, other_PxT)]
    shared_PxT = ablation.EditedRun(*runs, ActivationReplacement("counterpart")).prompts.prefix_PxT
    pairs = list(zip(prefix_PxT.ravel().tolist(), other_PxT.ravel().tolist(), strict=True))
    for a, first in zip(shared_PxT.ravel(), pairs, strict=True):
        assert [a == b for b in shared_PxT.ravel()] == [first == second for second in pairs]
    # Draws differ from prompt to prompt, so nothing is shared.
    drawn_PxT = ablation.EditedRun(*runs, ActivationReplacement("random", seed=np.uint32(3))).prompts.prefix_PxT
    assert len(np.unique(drawn_PxT)) == drawn_PxT.size


def test_the_same_prompt_as_counterpart_changes_nothing_and_is_not_run(split, pairs):
    (run,) = split.run(pairs)
    diffs = ablate_sets(split, [run], SETS, source=ActivationReplacement("counterpart"), counterparts=[run])
    assert (diffs.drop_SxP == 0).all() and diffs.rows == len(pairs)


def test_draws_are_activations_at_other_positions(split, dictionary, pairs):
    (run,) = split.run(pairs)
    f_BxTxF = activations(split, dictionary, run)[: len(run.index_P)]
    features_K = np.arange(f_BxTxF.shape[2])
    source = ablation.EditedRun(run, run, ActivationReplacement("random", seed=np.uint32(7)))
    removed_BxTxK, _ = ablation.gather(split.point, split.dictionary, *source.arrays, features_K, len(run.index_P))
    kept_BxTxK = f_BxTxF - np.asarray(removed_BxTxK, np.float64)[: len(f_BxTxF)]
    moved = 0
    for feature in features_K:
        own, drawn = f_BxTxF[:, :, feature], kept_BxTxK[:, :, feature]
        fires = own != 0
        assert (drawn[~fires] == 0).all()
        values = own[fires]
        for value, at in zip(drawn[fires], values, strict=True):
            assert np.isclose(value, values, atol=1e-5).any()
            if len(values) > 1 and np.isclose(values, at, atol=1e-5).sum() == 1:
                assert not np.isclose(value, at, atol=1e-6)
                moved += 1
    assert moved > 300
    # Draws do not depend on what else is gathered, and others come with another seed.
    some = features_K[30:50]
    again, _ = ablation.gather(split.point, split.dictionary, *source.arrays, some, len(run.index_P))
    np.testing.assert_allclose(np.asarray(again), np.asarray(removed_BxTxK)[:, :, some], atol=1e-6)
    other = ablation.EditedRun(run, run, ActivationReplacement("random", seed=np.uint32(8)))
    others, _ = ablation.gather(split.point, split.dictionary, *other.arrays, some, len(run.index_P))
    assert np.abs(np.asarray(others) - np.asarray(again)).max() > 0.1


def test_every_other_position_is_drawn_as_often(split, dictionary, pairs):
    (run,) = split.run(pairs)
    f_BxTxF = activations(split, dictionary, run)[: len(run.index_P)]
    feature = int(np.argmax((f_BxTxF != 0).sum((0, 1)) == 6))
    values = f_BxTxF[:, :, feature][f_BxTxF[:, :, feature] != 0]
    assert len(values) == 6
    drawn = []
    for seed in range(150):
        source = ablation.EditedRun(run, run, ActivationReplacement("random", seed=np.uint32(seed)))
        removed, _ = ablation.gather(
            split.point, split.dictionary, *source.arrays, np.array([feature]), len(run.index_P)
        )
        kept = f_BxTxF[:, :, feature] - np.asarray(removed)[: len(f_BxTxF), :, 0]
        drawn.append(kept[f_BxTxF[:, :, feature] != 0])
    counts = np.array([np.isclose(np.concatenate(drawn), value, atol=1e-5).sum() for value in values])
    assert counts.sum() >= 900 and counts.min() > 0.7 * 150 and counts.max() < 1.3 * 150


def test_each_clean_run_has_draws_of_its_own():
    source = ActivationReplacement("random", seed=np.uint32(3))
    seeds = [int(source.of_run(number).seed) for number in range(4)]
    assert len(set(seeds)) == 4 and seeds[0] == 3 and ActivationReplacement().of_run(2) == ActivationReplacement()


def test_two_clean_runs_of_the_same_prompts_are_replaced_differently(split, pairs):
    (run,) = split.run(pairs)
    other = dataclasses.replace(run, index_P=run.index_P + len(pairs))
    diffs = ablate_sets(split, [run, other], SETS, source=ActivationReplacement("random", seed=np.uint32(3)))
    first_SxP, second_SxP = np.split(diffs.drop_SxP, 2, axis=1)
    assert np.abs(first_SxP - second_SxP).max() > 0.01


def test_a_feature_that_fires_once_stays():
    f_BxTxK = jnp.zeros((2, 3, 2)).at[0, 1, 0].set(2.0).at[:, 2, 1].set(jnp.array([1.0, 5.0]))
    removed = ActivationReplacement("random", seed=np.uint32(0)).removed(
        f_BxTxK, f_BxTxK, jnp.ones((2, 3), bool), jnp.arange(2), jnp.int32(2)
    )
    assert (removed[:, :, 0] == 0).all()
    np.testing.assert_array_equal(removed[:, 2, 1], [-4.0, 4.0])  # the two change places
    copies = ActivationReplacement("random", seed=np.uint32(0)).removed(
        f_BxTxK, f_BxTxK, jnp.ones((2, 3), bool), jnp.arange(2), jnp.int32(1)
    )
    assert (copies[0] == 0).all()  # the second row is a copy that does not count


def test_prompts_without_a_counterpart(tiny, split, pairs):
    with pytest.raises(UserError, match="'The .*', has no counterpart: give it one"):
        split.run_counterparts([*same_lengths(tiny, pairs)[:2], dataclasses.replace(pairs[0], counterpart="")])
    longer = dataclasses.replace(pairs[0], counterpart=pairs[0].text + " and so on")
    with pytest.raises(UserError, match="takes pairs of one length"):
        split.run_counterparts([longer])
