"""CPR and CMD: by hand, where the answer is known, and where there is none."""

import numpy as np
import pytest
from linear_experiment import LinearExperiment

from saejax.causal.circuits import sizes
from saejax.settings import AblateConfig

CONFIG = AblateConfig(bootstrap=200)


def by_hand(world, order, shares):
    """f of the first so many features, one by one, and both areas."""
    total = sum(world.drop([feature]).mean() for feature in order)
    kept = [sum(world.drop([feature]).mean() for feature in order[: int(np.ceil(s * len(order)))]) for s in shares]
    f_S = np.array(kept) / total
    widths = np.diff(shares)
    cpr, cmd = (sum(w * (a + b) / 2 for w, a, b in zip(widths, h, h[1:])) for h in (f_S, np.abs(f_S - 1)))
    return f_S, cpr, cmd


@pytest.fixture(scope="module")
def world():
    """1,000 features: some carry the answer, some speak against it, most matter little."""
    rng = np.random.default_rng(0)
    gain_F = 0.02 * rng.random(1000)
    gain_F[:20], gain_F[20:30] = 2.0, -1.0
    return LinearExperiment(gain_F, prompts=40)


def test_scores_equal_sums_by_hand(world):
    found = sizes.measure_sizes(world, world.attribution(), CONFIG)
    attribution_F, shares = world.attribution(), np.array(sizes.SHARES)
    assert found.features == 1000 and found.sizes == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    f_S, cpr, _ = by_hand(world, np.argsort(-attribution_F), shares)
    np.testing.assert_allclose(found.faithfulness["signed"], f_S)
    assert found.scores["cpr"].own.mean == pytest.approx(cpr)
    f_S, _, cmd = by_hand(world, np.argsort(-np.abs(attribution_F)), shares)
    np.testing.assert_allclose(found.faithfulness["size"], f_S)
    assert found.scores["cmd"].own.mean == pytest.approx(cmd)


def test_attribution_beats_random_orders_and_activity(world):
    found = sizes.measure_sizes(world, world.attribution(), CONFIG)
    cpr, cmd = found.scores["cpr"], found.scores["cmd"]
    assert cpr.own.low > cpr.random.high and cpr.own.low > cpr.activity.high
    assert cmd.own.high < cmd.random.low and cmd.own.high < cmd.activity.low
    assert cpr.p_value == cmd.p_value == pytest.approx(1 / (1 + sizes.DRAWS))
    # Leaving out what speaks against the answer does better than the model, for which CMD gives nothing.
    assert max(found.faithfulness["signed"]) > 1 and cpr.own.mean > 1


def test_an_order_that_knows_nothing_is_no_better_than_random_ones(world):
    p_values = []
    for seed in range(40):
        noise_F = np.random.default_rng([seed, 3]).normal(size=1000)
        scores = sizes.measure_sizes(world, noise_F, AblateConfig(bootstrap=100, seed=seed)).scores
        p_values.append([scores["cpr"].p_value, scores["cmd"].p_value])
    assert (np.array(p_values) <= 0.1).mean(axis=0).max() <= 0.25  # 10 % is expected, 3 standard errors are 14 %


def test_one_feature_and_nothing_to_keep():
    one = sizes.measure_sizes(LinearExperiment(np.array([1.0])), np.array([1.0]), CONFIG)
    assert one.sizes == (1,) and one.faithfulness["signed"] == (1.0,) and one.scores["cpr"].own.mean == 0.0
    none = LinearExperiment(np.array([1.0, 1.0]), dead=(0, 1))
    assert sizes.measure_sizes(none, np.zeros(2), CONFIG) is None
    against = sizes.measure_sizes(LinearExperiment(np.array([-1.0, -1.0])), np.ones(2), CONFIG)
    assert "does not clearly cost" in against.reason and not against.scores
