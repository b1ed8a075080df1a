"""What stands in place of removed features: which activations are drawn, and what must change nothing."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import ablate_sets, draw_falls

from saejax.errors import UserError
from saejax.interventions import engine
from saejax.interventions.edits import WORDS, ActivationReplacement
from saejax.interventions.settings import REPLACEMENTS
from saejax.interventions.split_model import SplitModel

SETS = [[3], [40], [7, 90, 120], list(range(0, 160, 2))]


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def split(tiny, dictionary):
    return SplitModel(tiny, dictionary)


def draws(seed):
    return ActivationReplacement("random", seed=np.uint32(seed))


def activations(dictionary, run):
    """f [B, T, F] of a clean run, 0 outside the domain, in fp64."""
    f_BxTxF = np.asarray(dictionary.encode(run.value_BxTxD), np.float64)
    return f_BxTxF * np.asarray(run.domain_BxT)[:, :, None]


def test_every_kind_is_described():
    assert tuple(WORDS) == REPLACEMENTS


def test_a_prefix_is_shared_where_that_of_the_counterpart_is_too():
    prefix_PxT, second_PxT = np.array([[0, 1, 1], [0, 2, 2], [0, 1, 0]]), np.array([[0, 0, 2], [2, 0, 0], [0, 0, 2]])
    second = types.SimpleNamespace(prefix_PxT=second_PxT)
    run = types.SimpleNamespace(prefix_PxT=prefix_PxT, last_B=np.zeros(3), counterpart=second)
    shared_PxT = engine.EditedRun(run, ActivationReplacement("counterpart")).prompts.prefix_PxT
    pairs = list(zip(prefix_PxT.ravel().tolist(), second_PxT.ravel().tolist(), strict=True))
    for a, first in zip(shared_PxT.ravel(), pairs, strict=True):
        assert [a == b for b in shared_PxT.ravel()] == [first == second for second in pairs]
    # Draws differ from prompt to prompt, so nothing is shared.
    drawn_PxT = engine.EditedRun(run, draws(3)).prompts.prefix_PxT
    assert len(np.unique(drawn_PxT)) == drawn_PxT.size


# Statement 6 of WORKSPACE.md, what must hold.
def test_the_same_prompt_as_counterpart_changes_nothing_and_is_not_run(split, pairs):
    (run,) = split.run(pairs)
    paired = dataclasses.replace(run, counterpart=run)
    diffs = ablate_sets(split, [paired], SETS, source=ActivationReplacement("counterpart"))
    assert (diffs.drop_SxP == 0).all() and diffs.rows == len(pairs)


def test_draws_are_activations_at_other_positions(split, dictionary, pairs):
    (run,) = split.run(pairs)
    f_BxTxF = activations(dictionary, run)[: len(run.index_P)]
    features_K = np.arange(f_BxTxF.shape[2])
    fall_BxTxK = draw_falls(split, run, draws(7), features_K)
    kept_BxTxK = f_BxTxF - fall_BxTxK
    moved = 0
    for feature in features_K:
        before, drawn = f_BxTxF[:, :, feature], kept_BxTxK[:, :, feature]
        fires = before != 0
        assert (drawn[~fires] == 0).all()
        values = before[fires]
        for value, at in zip(drawn[fires], values, strict=True):
            assert np.isclose(value, values, atol=1e-5).any()
            if len(values) > 1 and np.isclose(values, at, atol=1e-5).sum() == 1:
                assert not np.isclose(value, at, atol=1e-6)
                moved += 1
    assert moved > 300
    # Draws do not depend on what else is gathered, and others come with another seed.
    some = features_K[30:50]
    again = draw_falls(split, run, draws(7), some)
    np.testing.assert_allclose(again, fall_BxTxK[:, :, some], atol=1e-6)
    assert np.abs(draw_falls(split, run, draws(8), some) - again).max() > 0.1


def test_every_other_position_is_drawn_as_often(split, dictionary, prompts):
    (run,) = split.run(prompts[:11])
    f_BxTxF = activations(dictionary, run)[: len(run.index_P)]
    feature = int(np.argmax((f_BxTxF != 0).sum((0, 1)) == 6))
    values = f_BxTxF[:, :, feature][f_BxTxF[:, :, feature] != 0]
    assert len(values) == 6
    drawn = []
    for seed in range(150):
        kept = f_BxTxF[:, :, feature] - draw_falls(split, run, draws(seed), np.array([feature]))[:, :, 0]
        drawn.append(kept[f_BxTxF[:, :, feature] != 0])
    counts = np.array([np.isclose(np.concatenate(drawn), value, atol=1e-5).sum() for value in values])
    assert counts.sum() >= 900 and counts.min() > 0.7 * 150 and counts.max() < 1.3 * 150


def test_two_clean_runs_of_the_same_prompts_are_replaced_differently(split, pairs):
    (run,) = split.run(pairs)
    again = dataclasses.replace(run, index_P=run.index_P + len(pairs))
    diffs = ablate_sets(split, [run, again], SETS, source=draws(3))
    first_SxP, second_SxP = np.split(diffs.drop_SxP, 2, axis=1)
    assert np.abs(first_SxP - second_SxP).max() > 0.01


def test_a_feature_that_fires_once_stays():
    f_BxTxK = jnp.zeros((2, 3, 2)).at[0, 1, 0].set(2.0).at[:, 2, 1].set(jnp.array([1.0, 5.0]))

    def removed(rows):
        return draws(0).removed(f_BxTxK, f_BxTxK, jnp.ones((2, 3), bool), jnp.arange(2), jnp.int32(rows))

    assert (removed(2)[:, :, 0] == 0).all()
    np.testing.assert_array_equal(removed(2)[:, 2, 1], [-4.0, 4.0])  # the two change places
    assert (removed(1)[0] == 0).all()  # the second row is a copy that does not count


def test_a_counterpart_of_another_length_is_refused(split, pairs):
    longer = dataclasses.replace(pairs[0], counterpart=pairs[0].text + " and so on")
    with pytest.raises(UserError, match="takes pairs of one length"):
        split.run([*pairs[1:3], longer], counterparts=True)
