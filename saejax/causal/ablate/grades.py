"""The graded answers of a behaviour: what its measurements allow to be said, from the least to the most.

- *harms*: removing the top features together costs the behaviour: the interval of the drop in logit difference lies
  above zero, and accuracy falls by more than a given share;
- *beyond matched features*: and more than removing random features matched to them (``claims``);
- *beyond other bases*: and more than changing the site as much along the top directions of each other basis, whether as
  much means the norm of the change or the divergence on held-out text (``dose``): the interval of the difference
  between the areas under the curves of effect against dose lies above zero, for both;
- *selective*: and it costs the behaviour and not just anything: no other behaviour of the run loses more accuracy than
  that share or as large a share of its logit difference, and cross-entropy on held-out text rises by less than a given
  number of nats (the upper end of its interval).

Each asks for more than the one before; the highest that holds with all before it is what a report says first.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from saejax.causal.ablate.results import BehaviourAblation, DoseCurve, Grade, Grades, OtherBehaviour
from saejax.causal.claims import LEAST_SETS, Claim, Rule, SetEffects, claims
from saejax.causal.clustered import Resampling
from saejax.interventions.replacement import WORDS
from saejax.results import Interval
from saejax.settings import AblateConfig
from saejax.tasks.scoring import middle

GRADES = ("harms", "beyond_matched", "beyond_bases", "selective")
_REPEATED = (
    "It holds again if in every training, with top features and sets of its own, the first two answers hold, the "
    "largest of their p-values being corrected for the behaviours. "
)
_NOT_YET = Grade(None, "not measured")
UNKNOWN = Grades(_NOT_YET, _NOT_YET, _NOT_YET, _NOT_YET, highest="none")


def claim_rule(config: AblateConfig) -> Rule:
    """The numbers of the rule of ``claims``."""
    return Rule(min_accuracy_drop=config.min_accuracy_drop, resamples=config.bootstrap, seed=config.seed)


def rule(config: AblateConfig) -> str:
    """The rules of the answers, in words."""
    level = f"{claim_rule(config).level:g}"
    return (
        f"Removing the top {config.top} features together harms a behaviour if the interval of the drop in logit "
        f"difference lies above zero and accuracy falls by more than {100 * config.min_accuracy_drop:g} percentage "
        f"points. It goes beyond matched features if of {config.draws} sets, drawn from matched random features and "
        "the top ones themselves, so few cost as much logit difference, and as much accuracy, that both p-values are "
        f"at most {level} after Holm's correction over the behaviours of the run, and the interval of the drop minus "
        "the mean drop of those sets lies above zero. It goes beyond other bases if the area under its curve of effect "
        "against dose is larger than that of the top directions of each other basis, with the interval of the "
        "difference above zero, both where the dose is the norm of the change and where it is the divergence on "
        "held-out text. It is "
        f"selective if no other behaviour loses more than {100 * config.min_accuracy_drop:g} points of accuracy or as "
        "large a share of its logit difference, and cross-entropy on held-out text rises by less than "
        f"{config.max_ce_rise:g} nats. Each answer asks for those before it. "
        f"{_REPEATED if config.repeats else ''}Intervals are 95 % bootstrap intervals "
        f"over templates and test prompts. When a feature is removed, {WORDS[config.replacement]}."
    )


def graded(result: BehaviourAblation, claim: Claim, config: AblateConfig) -> BehaviourAblation:
    """The result with the answers that its measurements allow."""
    found = dict(
        harms=_harms(result, config),
        beyond_matched=_beyond_matched(result, claim, config),
        beyond_bases=_beyond_bases(result),
        selective=_selective(result, config),
    )
    highest = "none"
    for name, grade in found.items():
        if not grade.holds:
            break
        highest = name
    return dataclasses.replace(result, claim=claim, grades=Grades(**found, highest=highest))


@dataclasses.dataclass(frozen=True)
class SavedEffects:
    """What a behaviour's part wrote, of P test prompts.

    Attributes:
      effects: what the rule of ``claims`` asks about.
      clean_P, joint_P: logit differences with nothing and with its own top features removed.
      template_P: which template each prompt was made from.
      others: logit differences without the top features of other behaviours, by their names.
    """

    effects: SetEffects
    clean_P: np.ndarray
    joint_P: np.ndarray
    template_P: np.ndarray
    others: Mapping[str, np.ndarray]


def settled(
    results: Mapping[str, BehaviourAblation], saved: Mapping[str, SavedEffects], config: AblateConfig
) -> dict[str, BehaviourAblation]:
    """The behaviours' results with the answers of the run: corrected for how many it tests, beside one another."""
    found = claims({name: saved[name].effects for name in results}, claim_rule(config))
    return {
        name: graded(
            dataclasses.replace(
                result,
                others={
                    other: _other(saved[name], saved[other], saved[other].others[name], config)
                    for other in results
                    if name in saved[other].others
                }
                or None,
            ),
            found[name],
            config,
        )
        for name, result in results.items()
    }


def _other(own: SavedEffects, other: SavedEffects, left_P: np.ndarray, config: AblateConfig) -> OtherBehaviour:
    """What removing the top features of one behaviour leaves of another."""
    over = Resampling.of(other.template_P, config.bootstrap, config.seed)
    lost_P = (other.clean_P > 0).astype(np.float64) - (left_P > 0)
    apart = None
    if own.clean_P.mean() > 0 and other.clean_P.mean() > 0:
        own_over = Resampling.of(own.template_P, config.bootstrap, config.seed + 1)
        sides = (own_over.share_RxP, own.clean_P, own.joint_P), (over.share_RxP, other.clean_P, left_P)
        # The clean mean is held: it only brings the drops of two behaviours to one scale.
        here, there = (some_RxP @ (clean_P - less_P) / clean_P.mean() for some_RxP, clean_P, less_P in sides)
        mean = 1 - own.joint_P.mean() / own.clean_P.mean() - (1 - left_P.mean() / other.clean_P.mean())
        apart = middle(here - there, float(mean))
    return OtherBehaviour(over.mean(other.clean_P - left_P), over.mean(lost_P), apart)


def _harms(result: BehaviourAblation, config: AblateConfig) -> Grade:
    joint = result.joint
    if not joint.n:
        return Grade(False, "no feature has an attribution above zero on the train prompts")
    costs = joint.accuracy_drop.mean > config.min_accuracy_drop
    silent = joint.n - joint.firing
    return Grade(
        costs and joint.logit_diff_drop.low > 0,
        f"without the {joint.n} features accuracy goes from {100 * joint.clean_accuracy:.0f} % to "
        f"{100 * joint.ablated_accuracy:.0f} %, a drop of {100 * joint.accuracy_drop.mean:.1f} points "
        f"({'more' if costs else 'not more'} than {100 * config.min_accuracy_drop:g}), and the logit difference falls "
        f"by {_shown(joint.logit_diff_drop)}"
        + (f"; {silent} of the features never fire on the test prompts" if silent else ""),
    )


def _beyond_matched(result: BehaviourAblation, claim: Claim, config: AblateConfig) -> Grade:
    if not result.joint.firing:
        return Grade(None, "no top feature fires on the test prompts, so there is nothing to match")
    found = result.controls
    if found.disjoint_sets is not None and found.disjoint_sets < LEAST_SETS:
        few = f"the pool of matched features holds {found.disjoint_sets} sets without a feature in common: "
        return Grade(None, f"{few}at least {LEAST_SETS} are needed for an answer")
    family = f" after correction for {claim.behaviours} behaviours" if claim.behaviours > 1 else ""
    reason = (
        f"the logit difference falls by {_shown(result.difference)} more than with matched random sets; sets "
        f"drawn from those and the top features cost as much with p = {claim.p_logit_diff:.2g} in logit difference and "
        f"{claim.p_accuracy:.2g} in accuracy, "
        f"{claim.p_holm:.2g}{family} ({claim.draws} draws on {claim.prompts} prompts)"
    )
    if config.draws < claim.least_draws:
        return Grade(None, f"{reason}; at least {claim.least_draws} draws are needed for an answer")
    return Grade(bool(claim.p_holm <= claim_rule(config).level and claim.low > 0), reason)


def _beyond_bases(result: BehaviourAblation) -> Grade:
    """Of the bases that were compared; one that has no directions says nothing."""
    curves = {
        name: curve
        for name, curve in (result.doses or {}).items()
        if isinstance(curve, DoseCurve) and name != "features"
    }
    if not any(curve.by_norm for curve in curves.values()):
        reasons = {curve.reason for curve in (result.doses or {}).values() if not isinstance(curve, DoseCurve)}
        return Grade(None, "; ".join(["no other basis was compared", *sorted(reasons)]))
    if any(curve.kl is None for curve in curves.values()):
        return Grade(None, "doses by divergence were not measured: there is no held-out text")
    better = [name for name, curve in curves.items() if _all(curve, lambda apart: apart.high < 0)]
    behind = [name for name, curve in curves.items() if _all(curve, lambda apart: apart.low > 0)]
    level = [name for name in curves if name not in (*better, *behind)]
    said = [
        f"{words}: {', '.join(names)}"
        for words, names in (
            ("more is lost along the top directions of", better),
            ("as much, as far as these prompts tell, is lost along those of", level),
            ("less is lost along those of", behind),
        )
        if names
    ]
    return Grade(not (better or level), f"at equal dose {'; '.join(said)}")


def _all(curve: DoseCurve, holds) -> bool:
    """Whether something holds of the differences at equal norm and at equal divergence."""
    return all(at is not None and holds(at.difference) for at in (curve.by_norm, curve.by_kl))


def _selective(result: BehaviourAblation, config: AblateConfig) -> Grade:
    text = result.text
    if text is None:
        return Grade(None, "held-out text was not measured")
    small = text.rise.high < config.max_ce_rise
    touched = [
        name
        for name, other in (result.others or {}).items()
        if other.accuracy_drop.mean > config.min_accuracy_drop
        or (other.share_apart is not None and not other.share_apart.low > 0)
    ]
    beside = (
        f"{', '.join(touched)} suffers, too"
        if touched
        else f"none of the {len(result.others)} other behaviours suffers as much"
        if result.others
        else "no other behaviour was tested"
    )
    return Grade(
        small and not touched,
        f"{beside}; cross-entropy on held-out text rises by {_shown(text.rise, 3)} nats "
        f"({'less' if small else 'not clearly less'} than {config.max_ce_rise:g})",
    )


def _shown(value: Interval, digits: int = 2) -> str:
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
