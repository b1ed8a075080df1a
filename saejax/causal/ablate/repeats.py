"""Does another training say the same? The first two answers, asked again of other dictionaries.

Trainings that differ in their seed, or by no more than rounding, end in other features, and what is found of one set of
features need not hold of another. Each dictionary therefore has top features, controls and draws of its own, and a
behaviour *holds again* if every one of them harms it and goes beyond matched features. Its p-value is the largest of
all trainings (an intersection-union test: Berger, 1982), which is at most a with a probability of at most a as soon as
that is so in one of them, however much trainings depend on each other; Holm's correction over the behaviours follows.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from saejax.causal.ablate import verdict
from saejax.causal.ablate.experiment import ModelExperiment
from saejax.causal.ablate.results import BehaviourAblation, Grade, RepeatedTest
from saejax.causal.claims import LEVEL
from saejax.causal.statistics import holm
from saejax.dictionaries import Dictionary
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import LanguageModel
from saejax.settings import AblateConfig


def measure_repeats(
    experiment: ModelExperiment, model: LanguageModel, others: Mapping[str, Dictionary], config: AblateConfig
) -> dict[str, RepeatedTest]:
    """Tests other dictionaries on the behaviour of an experiment, each as if it were the tested one.

    Raises:
      UserError: a dictionary belongs to another model, too few of its features fire, or something is not finite.
    """
    found = {}
    for name, other in others.items():
        moved = experiment.on(SplitModel(model, other, config.positions, config.error), name)
        result, _ = verdict.judge(experiment.name, moved, config)
        (found[name],) = result.trainings
    return found


def hold_again(results: Mapping[str, BehaviourAblation]) -> dict[str, Grade]:
    """Whether the first two answers hold in all trainings, for every behaviour of a run that has repeats."""
    repeated = {name: result for name, result in results.items() if result.repeats}
    p_B = np.array([max(map(_p, result.trainings)) for result in repeated.values()])
    return {
        name: _grade(result.trainings, float(p), float(p_holm))
        for (name, result), p, p_holm in zip(repeated.items(), p_B, holm(p_B), strict=True)
    }


def _p(test: RepeatedTest) -> float:
    return max(test.claim.p_logit_diff, test.claim.p_accuracy)


def _grade(tests: Sequence[RepeatedTest], p: float, p_holm: float) -> Grade:
    harm = sum(bool(test.harms.holds) for test in tests)
    # The tested dictionary's own answer is corrected for the other behaviours; here each counts by itself, and the
    # correction comes once, at the end.
    beyond = [None if test.beyond_matched.holds is None else _p(test) <= LEVEL and test.claim.low > 0 for test in tests]
    holds: bool | None = p_holm <= LEVEL
    if harm < len(tests) or False in beyond:
        holds = False
    elif None in beyond:
        holds = None
    drops = ", ".join(f"{100 * test.joint.accuracy_drop.mean:.0f}" for test in tests)
    unknown = f", and of {beyond.count(None)} it is not known" if None in beyond else ""
    return Grade(
        holds,
        f"of {len(tests)} trainings {harm} harm, and {beyond.count(True)} go beyond matched features{unknown}; "
        f"accuracy falls by {drops} points; the largest p is {p:.2g}, {p_holm:.2g} after correction for the behaviours",
    )
