"""An answer that has to hold in several trainings: the largest p of them, corrected for the behaviours."""

import dataclasses

import numpy as np
import pytest
from linear_experiment import LinearExperiment

from saejax.causal.ablate import agreement, repeats, verdict
from saejax.causal.statistics import holm
from saejax.errors import UserError
from saejax.settings import AblateConfig

CONFIG = AblateConfig(bootstrap=500, draws=99, matches=10, min_accuracy_drop=0.0)


def training(seed, gain=0.5, base=-1.0):
    """800 features, of which 20 carry as much as is said."""
    gain_F = 0.01 * np.random.default_rng(seed).normal(size=800)
    gain_F[50:70] = gain
    return verdict.judge("planted", LinearExperiment(gain_F, base=base, seed=seed), CONFIG)[0]


@pytest.fixture(scope="module")
def found():
    """Three trainings that find what was planted, and one in which the features carry nothing."""
    true = [training(seed) for seed in range(3)]
    return true, training(3, gain=0.01, base=0.5)


def repeated(first, *others):
    return dataclasses.replace(first, repeats={f"seed{i}": other.trainings[0] for i, other in enumerate(others)})


def with_p(result, p_logit_diff, p_accuracy):
    claim = dataclasses.replace(result.claim, p_logit_diff=p_logit_diff, p_accuracy=p_accuracy)
    return dataclasses.replace(result, claim=claim)


def test_what_holds_in_each_training_holds_again(found):
    (first, second, third), empty = found
    again = repeats.hold_again(dict(one=repeated(first, second, third), two=repeated(first, second, empty)))
    assert again["one"].holds is True and again["two"].holds is False
    assert again["one"].reason.startswith("of 3 trainings 3 harm, and 3 go beyond matched features; accuracy falls by ")
    assert again["two"].reason.startswith("of 3 trainings 2 harm, and 2 go")
    drops = [f"{100 * one.joint.accuracy_drop.mean:.0f}" for one in (first, second, third)]
    assert f"falls by {', '.join(drops)} points" in again["one"].reason


def test_the_largest_p_is_corrected_for_the_behaviours(found):
    (first, second, _), _ = found

    # The larger p of a training, then the largest of trainings, then Holm's correction: 0.02 and 0.03.
    one = repeated(with_p(first, 0.001, 0.02), with_p(second, 0.01, 0.004))
    two = repeated(with_p(first, 0.001, 0.002), with_p(second, 0.03, 0.03))
    again = repeats.hold_again(dict(one=one, two=two))
    assert [round(p, 3) for p in holm(np.array([0.02, 0.03]))] == [0.04, 0.04]
    assert again["one"].holds and again["two"].holds and "the largest p is 0.02, 0.04" in again["one"].reason
    three = repeated(with_p(first, 0.001, 0.002), with_p(second, 0.03, 0.051))
    again = repeats.hold_again(dict(one=one, three=three))
    assert again["one"].holds and again["three"].holds is False and "2 harm, and 1 go" in again["three"].reason


def test_what_is_not_known_of_one_training_is_not_known_of_all(found):
    (first, second, _), empty = found
    unknown = dataclasses.replace(
        second,
        grades=dataclasses.replace(
            second.grades, beyond_matched=dataclasses.replace(second.grades.beyond_matched, holds=None)
        ),
    )
    again = repeats.hold_again(dict(one=repeated(first, unknown), two=repeated(first, unknown, empty)))
    assert again["one"].holds is None and "of 1 it is not known" in again["one"].reason
    assert again["two"].holds is False


def test_where_nothing_is_true_of_one_training_a_run_says_yes_at_most_as_often_as_its_level(found):
    """Four behaviours, of which one training knows nothing and says what chance does; the other always says yes."""
    (first, second, _), _ = found
    rng, runs, said = np.random.default_rng(0), 500, 0
    for p_B in rng.integers(1, 101, (runs, 4)) / 100:
        run = {str(b): repeated(with_p(first, 0.01, 0.01), with_p(second, p, 0.01)) for b, p in enumerate(p_B)}
        said += any(grade.holds for grade in repeats.hold_again(run).values())
    assert 0.01 < said / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_no_repeats_and_names_that_come_twice(found):
    (first, *_), _ = found
    assert repeats.hold_again(dict(one=first)) == {} and first.holds_again is None
    agreement.check(AblateConfig(repeats=("topk/seed2",)))
    for names in (("topk",), ("topk/seed2", "topk/seed2")):
        with pytest.raises(UserError, match="name each dictionary once, the tested one never"):
            agreement.check(AblateConfig(repeats=names))
