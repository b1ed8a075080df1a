"""What is measured of one behaviour: which features are tested, what removing them costs, and beside which controls.

A *drop* is clean minus ablated, of logit(correct) - logit(wrong) or of accuracy (1 where the correct answer's logit is
above the wrong one's, else 0). Intervals are 95 % bootstrap intervals over templates and the test prompts in them.

A top feature that fires neither on the test prompts nor on those that lend what stands in its place (the train prompts
for ``mean``, the counterparts for ``counterpart``) has an effect of exactly 0 (in a linear dictionary, whose small
activations do not count as firing, of nearly 0). It has no matched control, and the control sets leave it out.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.causal import controls
from saejax.causal.ablate.grades import UNKNOWN, claim_rule, graded
from saejax.causal.ablate.results import (
    BehaviourAblation,
    ControlDraws,
    JointAblation,
    ReadoutChange,
    TopFeature,
)
from saejax.causal.claims import (
    SetEffects,
    claims,
    run_draws,
)
from saejax.causal.clustered import Resampling
from saejax.causal.experiment import Experiment
from saejax.causal.matched_sets import SPARE, draw_matched_sets
from saejax.causal.results import ControlMatch
from saejax.interventions import slopes as screening
from saejax.interventions.engine import LogitDiffs
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.results import Interval
from saejax.settings import AblateConfig

CONTROLS = 100  # sets, at most, of matched features alone, beside which figures are shown
SINGLES = 3  # matched features that are removed one by one beside each top feature
Over = Callable[[np.ndarray], Interval]  # the mean of a number per prompt, and its interval


@dataclasses.dataclass(frozen=True)
class JudgedDiffs:
    """The logit differences that were measured for one behaviour, and with what.

    Attributes:
      top: the K top features, by attribution.
      fires_K: whether each of them fires, and so has matched controls, bool.
      attribution_F: of every feature, on the train prompts.
      controls_NxC: N sets of other features; column c is matched to the c-th top feature that fires.
      draws_MxC: the M sets of other and top features that were run, which decide p-values; see ``claims``.
      disjoint: how many sets of other features without one in common the pool holds.
      clean_P, joint_P: of the test prompts, with nothing and with all top features removed.
      top_KxP: with each top feature removed.
      chosen_Q: the places of the Q test prompts on which controls and draws were removed.
      controls_NxQ, draws_MxQ: with each of them removed.
      template_P: which template each test prompt was made from.
      others: without the top features of other behaviours, by their names, [P].
    """

    top: list[int]
    fires_K: np.ndarray
    attribution_F: np.ndarray
    controls_NxC: np.ndarray
    draws_MxC: np.ndarray
    disjoint: int
    clean_P: np.ndarray
    joint_P: np.ndarray
    top_KxP: np.ndarray
    chosen_Q: np.ndarray
    controls_NxQ: np.ndarray
    draws_MxQ: np.ndarray
    template_P: np.ndarray
    others: Mapping[str, np.ndarray]

    def beside(self, sets_NxQ: np.ndarray) -> SetEffects:
        """What the top features cost beside sets, given the logit differences without each of these."""
        own = self.clean_P[self.chosen_Q], self.joint_P[self.chosen_Q]
        return SetEffects.of(*own, sets_NxQ, self.template_P[self.chosen_Q], self.disjoint)


def judge(
    name: str, experiment: Experiment, config: AblateConfig, others: Mapping[str, Sequence[int]] | None = None
) -> tuple[BehaviourAblation, JudgedDiffs]:
    """Chooses the top features of a behaviour and removes them, their controls and the draws.

    Args:
      name: of the behaviour; with ``config.seed`` it decides the draws.
      others: top features of other behaviours, by name, which are removed from this one's test prompts, too.

    Returns:
      The behaviour's entry in the results of the stage, as if it were the only one of its run, and what it was derived
      from.

    Raises:
      UserError: too few other features fire for matched controls, or something is not finite.
    """
    top = screening.leaders(experiment.attribution(), config.top)
    statistics = experiment.statistics()
    firing = statistics.firing(top)
    counts, seed = (min(config.draws, CONTROLS), config.draws), [config.seed, *name.encode()]
    spare = SPARE if len(firing) > 1 else 1
    drawn = draw_matched_sets(
        statistics, firing, experiment.changes, counts, config.matches, seed, controls.ADVICE, spare
    )
    nearest_CxS = controls.nearest_features(statistics, firing)[:, : min(SINGLES, config.matches)]
    singles, foreign = np.unique(nearest_CxS), dict(others or {})
    diffs = experiment.ablate([*([f] for f in top), top, *foreign.values(), *([single] for single in singles)])
    ends = np.cumsum([len(top), 1, len(foreign)])
    top_KxP, joint_1xP, foreign_BxP, singles_UxP = np.split(diffs.ablated_SxP, ends)
    measured = JudgedDiffs(
        top=top,
        fires_K=statistics.fires_at_all_F[np.asarray(top, np.int64)],
        attribution_F=experiment.attribution(),
        controls_NxC=drawn.controls_NxC,
        draws_MxC=drawn.draws_MxC,
        disjoint=drawn.disjoint,
        clean_P=diffs.clean_P,
        joint_P=joint_1xP[0],
        top_KxP=top_KxP,
        chosen_Q=spread_over(experiment.templates, config.draw_prompts),
        controls_NxQ=np.zeros((0, 0)),
        draws_MxQ=np.zeros((0, 0)),
        template_P=np.asarray(experiment.templates),
        others=dict(zip(foreign, foreign_BxP, strict=True)),
    )
    measured, beside, rows = _with_draws(measured, experiment, config)
    single_drop_U = (diffs.clean_P[None, :] - singles_UxP).mean(axis=1)
    single_drop_C = single_drop_U[np.searchsorted(singles, nearest_CxS)].mean(axis=1)
    over = over_prompts(measured.template_P, config)
    entries = _entries(measured, statistics, dict(zip(firing, single_drop_C.tolist(), strict=True)), over)
    joint = _joint(measured, len(firing), _readouts(diffs, beside, len(top), over), over)
    return _judged(measured, entries, joint, drawn.match, diffs.rows + rows, config), measured


def spread_over(templates: Sequence[str], count: int) -> np.ndarray:
    """The places of so many prompts, evenly spread over their templates, rising; of all for 0."""
    order_P = np.argsort(np.asarray(templates), kind="stable")
    if not 0 < count < len(order_P):
        return np.arange(len(order_P))
    return np.sort(order_P[np.arange(count) * len(order_P) // count])


def over_prompts(template_P: np.ndarray, config: AblateConfig) -> Over:
    """Gives the mean of a number per prompt, and its bootstrap interval over templates and prompts."""
    return Resampling.of(template_P, config.bootstrap, config.seed).mean


def _with_draws(
    measured: JudgedDiffs, experiment: Experiment, config: AblateConfig
) -> tuple[JudgedDiffs, LogitDiffs, int]:
    """Removes the controls, and the draws until all are run or none could change a no.

    Returns:
      The diffs with theirs, those of the controls with all readouts, and how many rows were run.
    """
    chosen = measured.chosen_Q.tolist()
    run = [experiment.ablate(measured.controls_NxC.tolist(), chosen)]

    def without(block: slice) -> np.ndarray:
        run.append(experiment.ablate(measured.draws_MxC[block].tolist(), chosen))
        return run[-1].ablated_SxP

    draws_MxQ, _ = run_draws(without, measured.beside, config.draws, claim_rule(config))
    experiment.skip((config.draws - len(draws_MxQ)) * len(chosen))
    found = dataclasses.replace(
        measured,
        controls_NxQ=run[0].ablated_SxP,
        draws_MxC=measured.draws_MxC[: len(draws_MxQ)],
        draws_MxQ=draws_MxQ,
    )
    return found, run[0], sum(part.rows for part in run)


def _entries(
    measured: JudgedDiffs, statistics: FeatureStatistics, control_drop: Mapping[int, float], over: Over
) -> tuple[TopFeature, ...]:
    """The top features one by one; ``control_drop`` is what those like each cost, of those that fire."""
    clean_P = measured.clean_P
    return tuple(
        TopFeature(
            feature=feature,
            attribution=float(measured.attribution_F[feature]),
            **statistics.of(feature),
            logit_diff_drop=over(clean_P - ablated_P),
            accuracy_drop=over(_correct(clean_P) - _correct(ablated_P)),
            control_drop=control_drop.get(feature),
        )
        for feature, ablated_P in zip(measured.top, measured.top_KxP, strict=True)
    )


def _readouts(diffs: LogitDiffs, beside: LogitDiffs, top: int, over: Over) -> dict[str, ReadoutChange]:
    """Of the set of all top features, which stands after each of them, and of the controls."""
    return {
        name: ReadoutChange(
            clean=float(clean_P.mean()),
            ablated=float(ablated_SxP[top].mean()),
            controls=float(beside.readouts[name][1].mean()),
            change=over(ablated_SxP[top] - clean_P),
        )
        for name, (clean_P, ablated_SxP) in diffs.readouts.items()
    }


def _joint(
    measured: JudgedDiffs,
    firing: int,
    readouts: dict[str, ReadoutChange],
    over: Over,
) -> JointAblation:
    return JointAblation(
        n=len(measured.top),
        firing=firing,
        clean_accuracy=float(_correct(measured.clean_P).mean()),
        ablated_accuracy=float(_correct(measured.joint_P).mean()),
        clean_logit_diff=float(measured.clean_P.mean()),
        logit_diff_drop=over(measured.clean_P - measured.joint_P),
        accuracy_drop=over(_correct(measured.clean_P) - _correct(measured.joint_P)),
        readouts=readouts,
    )


def _judged(
    measured: JudgedDiffs,
    top: tuple[TopFeature, ...],
    joint: JointAblation,
    match: ControlMatch,
    rows: int,
    config: AblateConfig,
) -> BehaviourAblation:
    shown = measured.beside(measured.controls_NxQ)
    control_drop_N = shown.draw_drop_NxP.mean(axis=1)
    over = over_prompts(shown.template_P, config)
    claim = claims(dict(one=measured.beside(measured.draws_MxQ)), claim_rule(config))["one"]
    found = BehaviourAblation(
        top=top,
        rows=rows,
        joint=joint,
        controls=ControlDraws(
            draws=shown.draws,
            logit_diff_drop=tuple(control_drop_N.tolist()),
            accuracy_drop=tuple(shown.draw_lost_NxP.mean(axis=1).tolist()),
            match=match,
            prompts=len(shown.drop_P),
            top_logit_diff_drop=float(shown.drop_P.mean()),
            top_accuracy_drop=float(shown.lost_P.mean()),
            disjoint_sets=measured.disjoint,
        ),
        difference=over(shown.drop_P - shown.draw_drop_NxP.mean(axis=0)),
        percentile=float((control_drop_N < shown.drop_P.mean()).mean()),
        grades=UNKNOWN,
    )
    return graded(found, claim, config)


def _correct(logit_diff: np.ndarray) -> np.ndarray:
    """1.0 where the correct answer's logit is above the wrong one's, else 0.0."""
    return (logit_diff > 0).astype(np.float64)
