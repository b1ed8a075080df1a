"""The judgement of one behaviour: which features are tested, beside which controls, and what the rule says.

A *drop* is clean minus ablated, of logit(correct) - logit(wrong) or of accuracy (1 where the correct answer's logit is
above the wrong one's, else 0). Intervals are 95 % bootstrap intervals over test prompts.

A top feature that fires neither on the test prompts nor on those that lend what stands in its place (the train prompts
for ``mean``, the counterparts for ``counterpart``) has an effect of exactly 0 (in a linear dictionary, whose small
activations do not count as firing, of nearly 0). It has no matched control, and the control sets leave it out.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from saejax.causal import controls, screening
from saejax.causal.ablate.results import (
    BehaviourAblation,
    ControlDraws,
    JointAblation,
    ReadoutChange,
    TopFeature,
)
from saejax.causal.ablation import LogitDiffs
from saejax.causal.activation_sources import WORDS
from saejax.causal.claims import Claim, Rule, SetEffects, claims
from saejax.causal.experiment import Experiment
from saejax.causal.results import ControlMatch
from saejax.results import Interval
from saejax.settings import AblateConfig
from saejax.tasks.scoring import bootstrap_mean

SINGLES = 3  # matched features that are removed one by one beside each top feature


def rule(config: AblateConfig) -> str:
    """The rule of the verdict, in words."""
    return (
        f"Yes if removing the top {config.top} features together lowers accuracy on the test prompts by more than "
        f"{100 * config.min_accuracy_drop:g} percentage points; if so few of {config.draws} sets of as many matched "
        "random features cost as much logit difference, and as much accuracy, that both p-values are at most "
        f"{claim_rule(config).level:g} after Holm's correction over the behaviours of the run; and if the 95 % "
        "bootstrap interval over prompts of the drop in logit difference minus the mean drop of those sets lies above "
        f"zero. Otherwise no. When a feature is removed, {WORDS[config.replacement]}."
    )


def claim_rule(config: AblateConfig) -> Rule:
    """The numbers of the rule."""
    return Rule(min_accuracy_drop=config.min_accuracy_drop, resamples=config.bootstrap, seed=config.seed)


@dataclasses.dataclass(frozen=True)
class JudgedDiffs:
    """The logit differences that were measured for one behaviour, and with what.

    Attributes:
      top: the K top features, by attribution.
      fires_K: whether each of them fires, and so has matched controls, bool.
      attribution_F: of every feature, on the train prompts.
      controls_NxC: the N drawn control sets; column c is matched to the c-th top feature that fires.
      clean_P, joint_P: of the test prompts, with nothing and with all top features removed.
      top_KxP, controls_NxP: with each top feature and with each control set removed.
    """

    top: list[int]
    fires_K: np.ndarray
    attribution_F: np.ndarray
    controls_NxC: np.ndarray
    clean_P: np.ndarray
    joint_P: np.ndarray
    top_KxP: np.ndarray
    controls_NxP: np.ndarray

    @property
    def effects(self) -> SetEffects:
        """What the rule asks about."""
        return effects_of(self.clean_P, self.joint_P, self.controls_NxP)


def effects_of(clean_P: np.ndarray, joint_P: np.ndarray, controls_NxP: np.ndarray) -> SetEffects:
    """What removing the top features and N sets of controls costs on each of P prompts.

    Args:
      clean_P, joint_P, controls_NxP: logit differences with nothing, all top features and each control set removed.
    """
    correct_P = _correct(clean_P)
    return SetEffects(
        drop_P=clean_P - joint_P,
        lost_P=correct_P - _correct(joint_P),
        draw_drop_NxP=clean_P[None, :] - controls_NxP,
        draw_lost_NxP=correct_P[None, :] - _correct(controls_NxP),
        template_P=np.zeros(len(clean_P), np.int64),  # prompts do not say what they were made from
    )


def settled(
    results: Mapping[str, BehaviourAblation], effects: Mapping[str, SetEffects], config: AblateConfig
) -> dict[str, BehaviourAblation]:
    """The behaviours' results with the verdicts of the run: corrected for how many behaviours it tests."""
    found = claims(effects, claim_rule(config))
    return {
        name: dataclasses.replace(
            result, verdict=found[name].yes, claim=found[name], reason=_reason(result, found[name], config)
        )
        for name, result in results.items()
    }


def judge(name: str, experiment: Experiment, config: AblateConfig) -> tuple[BehaviourAblation, JudgedDiffs]:
    """Chooses the top features of a behaviour, removes them and their controls, and applies the rule.

    Args:
      name: of the behaviour; with ``config.seed`` it decides the draws.
      experiment: what to measure with.
      config: of the stage.

    Returns:
      The behaviour's entry in the results of the stage, as if it were the only one of its run (``settled``), and what
      it was derived from.

    Raises:
      UserError: too few other features fire for matched controls, or something is not finite.
    """
    attribution_F = experiment.attribution()
    top = screening.leaders(attribution_F, config.top)
    statistics = experiment.statistics()
    firing = statistics.firing(top)
    controls_NxC = controls.draw_controls(
        statistics, firing, config.draws, config.matches, seed=[config.seed, *name.encode()]
    )
    nearest_CxS = controls.nearest_features(statistics, firing)[:, : min(SINGLES, config.matches)]
    singles = np.unique(nearest_CxS)
    diffs = experiment.ablate([*([feature] for feature in top), top, *controls_NxC, *([single] for single in singles)])

    ends = np.cumsum([len(top), 1, config.draws])
    top_KxP, joint_1xP, controls_NxP, singles_UxP = np.split(diffs.ablated_SxP, ends)
    fires_K = statistics.fires_at_all_F[np.asarray(top, np.int64)]
    measured = JudgedDiffs(
        top, fires_K, attribution_F, controls_NxC, diffs.clean_P, joint_1xP[0], top_KxP, controls_NxP
    )
    single_drop_U = (diffs.clean_P[None, :] - singles_UxP).mean(axis=1)
    single_drop_C = single_drop_U[np.searchsorted(singles, nearest_CxS)].mean(axis=1)
    control_drop = dict(zip(firing, single_drop_C.tolist(), strict=True))
    entries = tuple(
        TopFeature(
            feature=feature,
            attribution=float(attribution_F[feature]),
            firing_rate=float(statistics.firing_rate_F[feature]),
            mean_activation=float(statistics.mean_activation_F[feature]),
            logit_diff_drop=_interval(diffs.clean_P - ablated_P, config),
            accuracy_drop=_interval(_correct(diffs.clean_P) - _correct(ablated_P), config),
            control_drop=control_drop.get(feature),
        )
        for feature, ablated_P in zip(top, top_KxP, strict=True)
    )
    match = ControlMatch(**controls.match_ratios(statistics, firing, controls_NxC))
    joint = _joint(measured, len(firing), _readouts(diffs, len(top), config), config)
    judged = _judged(measured, entries, joint, match, diffs.rows, config)
    return settled({name: judged}, {name: measured.effects}, config)[name], measured


def _readouts(diffs: LogitDiffs, top: int, config: AblateConfig) -> dict[str, ReadoutChange]:
    """Of the set of all top features, which stands after each of them, before the controls."""
    return {
        name: ReadoutChange(
            clean=float(clean_P.mean()),
            ablated=float(ablated_SxP[top].mean()),
            controls=float(ablated_SxP[top + 1 : top + 1 + config.draws].mean()),
            change=_interval(ablated_SxP[top] - clean_P, config),
        )
        for name, (clean_P, ablated_SxP) in diffs.readouts.items()
    }


def _joint(
    measured: JudgedDiffs, firing: int, readouts: dict[str, ReadoutChange], config: AblateConfig
) -> JointAblation:
    return JointAblation(
        n=len(measured.top),
        firing=firing,
        clean_accuracy=float(_correct(measured.clean_P).mean()),
        ablated_accuracy=float(_correct(measured.joint_P).mean()),
        clean_logit_diff=float(measured.clean_P.mean()),
        logit_diff_drop=_interval(measured.clean_P - measured.joint_P, config),
        accuracy_drop=_interval(_correct(measured.clean_P) - _correct(measured.joint_P), config),
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
    effects = measured.effects
    control_drop_N = effects.draw_drop_NxP.mean(axis=1)
    return BehaviourAblation(
        top=top,
        rows=rows,
        joint=joint,
        controls=ControlDraws(
            draws=config.draws,
            logit_diff_drop=tuple(control_drop_N.tolist()),
            accuracy_drop=tuple(effects.draw_lost_NxP.mean(axis=1).tolist()),
            match=match,
        ),
        difference=_interval(effects.drop_P - effects.draw_drop_NxP.mean(axis=0), config),
        percentile=float((control_drop_N < effects.drop_P.mean()).mean()),
        verdict=False,
        reason="",
    )


def _reason(result: BehaviourAblation, claim: Claim, config: AblateConfig) -> str:
    joint, difference = result.joint, result.difference
    if not joint.n:
        return "No: no feature has an attribution above zero on the train prompts."
    drop, least = 100 * joint.accuracy_drop.mean, 100 * config.min_accuracy_drop
    costs, beats = joint.accuracy_drop.mean > config.min_accuracy_drop, claim.low > 0
    silent = joint.n - joint.firing
    family = f" after correction for {claim.behaviours} behaviours" if claim.behaviours > 1 else ""
    few = result.controls.draws < claim.least_draws
    return (
        f"{'Yes' if claim.yes else 'No'}: without the {joint.n} features accuracy goes from "
        f"{100 * joint.clean_accuracy:.0f} % to {100 * joint.ablated_accuracy:.0f} %, a drop of "
        f"{drop:.1f} points ({'more' if costs else 'not more'} than {least:g}), and the logit difference falls by "
        f"{joint.logit_diff_drop.mean:.2f}, which beyond matched random features is {difference.mean:.2f} "
        f"[{difference.low:.2f}, {difference.high:.2f}] ({'above' if beats else 'not clearly above'} zero); matched "
        f"random sets cost as much with p = {claim.p_logit_diff:.2g} in logit difference and {claim.p_accuracy:.2g} in "
        f"accuracy, {claim.p_holm:.2g}{family}"
        + (f"; {config.draws} draws are too few for a yes: at least {claim.least_draws} are needed" if few else "")
        + (f"; {silent} of the features never fire on the test prompts and have no control." if silent else ".")
    )


def _interval(values_P: np.ndarray, config: AblateConfig) -> Interval:
    return bootstrap_mean(values_P, config.bootstrap, config.seed)


def _correct(logit_diff: np.ndarray) -> np.ndarray:
    """1.0 where the correct answer's logit is above the wrong one's, else 0.0."""
    return (logit_diff > 0).astype(np.float64)
