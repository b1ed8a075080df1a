"""When a set of features may be said to cause a behaviour: a rule that matched random sets pass no more than it says.

Removing any set of features that fires often costs something. The rule therefore asks whether the tested set costs more
than *draws*: sets of as many features, one for each of the tested ones, from a pool of those matched to it and itself
(``controls.draw_alike``). If it does not matter which features of the pool are tested, the tested set is one more draw,
and of N draws and the tested set every one is as likely to cost most, so that

    p = (1 + draws that cost at least as much) / (1 + N)

is at most a with a probability of at most a, whatever the features' effects are like (a randomisation test; Davison and
Hinkley, 1997, section 4.2; Phipson and Smyth, 2010; Hemerik and Goeman, 2018). A run says *yes* of a behaviour where
all of this holds:

- p, the larger of those of logit difference and accuracy, is at most the level after Holm's correction (1979) over the
  behaviours of the run. Both must be small, so taking the larger costs no error (Berger, 1982);
- the 95 % bootstrap interval, over templates and prompts, of the drop in logit difference minus the draws' mean drop
  lies above zero: what is seen is not owed to a few prompts;
- accuracy falls by more than a given share, which is what the words "costs the behaviour" mean;
- the pool of matched features holds at least ``LEAST_SETS`` sets without a feature in common.

Draws that leave the tested features out would not do: those from a pool of few sets are alike, and where few features
have most of the effect the tested set is the only one that can hold one of them. With 5 disjoint sets and log-normal
effects such a rule says yes in 17 % of runs in which nothing is true (``tests/causal/test_null_worlds.py``). Here a
draw holds each tested feature about once in 1 + the pool's disjoint sets, so that one strong feature alone is not
enough.

Draws are run in blocks (``blocks``), and no more of them once none could change a no (``settled_no``): the answer is
that of all draws, and so is its error rate (curtailed sampling; compare Besag and Clifford, 1991). The p-values of a
behaviour that was stopped are those of the draws that were run.

An interval alone, over prompts and around the draws' mean, is no such rule: how much sets differ from one another does
not enter it, and it says yes to a quarter of random sets where features' effects differ.

The *placebo rate* is how often the same rule says yes to the draws, each put in the place of the tested set beside all
others. It is measured on the run's own draws, so whoever reads a yes can see what a yes is worth.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import binomtest

from saejax.causal.clustered import Resampling
from saejax.causal.statistics import holm

LEVEL = 0.05  # of the rule
LEAST_SETS = 5  # disjoint sets that the pool must hold: of fewer the draws hold much of the tested set
_ROUNDING = 1e-9  # of the largest effect: equal effects differ in their last bits


@dataclasses.dataclass(frozen=True)
class SetEffects:
    """What removing a tested set and N drawn sets costs on P test prompts of a behaviour.

    Attributes:
      drop_P: by how much the logit difference falls without the tested set.
      lost_P: 1 where the answer was right and is not any more, -1 the other way round, else 0.
      draw_drop_NxP, draw_lost_NxP: the same without each drawn set.
      template_P: which template each prompt was made from; prompts of one template are not independent.
      disjoint: how many sets without a feature in common the pool holds beside the tested one; None: not counted.
    """

    drop_P: np.ndarray
    lost_P: np.ndarray
    draw_drop_NxP: np.ndarray
    draw_lost_NxP: np.ndarray
    template_P: np.ndarray
    disjoint: int | None = None

    @classmethod
    def of(
        cls,
        clean_P: np.ndarray,
        joint_P: np.ndarray,
        sets_NxP: np.ndarray,
        template_P: np.ndarray,
        disjoint: int | None,
    ) -> "SetEffects":
        """From logit differences; an answer is right where it is above 0.

        Args:
          clean_P, joint_P, sets_NxP: with nothing, the tested set and each drawn set removed.
          template_P, disjoint: as above.
        """
        right_P, joint_right_P, right_NxP = (np.asarray(diff > 0, np.float64) for diff in (clean_P, joint_P, sets_NxP))
        drops = clean_P - joint_P, right_P - joint_right_P, clean_P[None, :] - sets_NxP, right_P[None, :] - right_NxP
        return cls(*drops, template_P, disjoint)

    @property
    def draws(self) -> int:
        """How many drawn sets there are."""
        return len(self.draw_drop_NxP)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the rule says of a behaviour, and how often it says so of drawn sets."""

    yes: bool  #: whether the tested set passes
    p_logit_diff: float  #: of the drop in logit difference, before correction
    p_accuracy: float  #: of the drop in accuracy, before correction
    p_holm: float  #: the larger of both, after Holm's correction over so many behaviours
    behaviours: int  #: of the run, which the correction is over
    low: float  #: of the drop in logit difference minus the draws' mean drop: lower end of the 95 % interval
    high: float  #: its upper end
    placebo_rate: float  #: share of draws to which the rule says yes
    placebo_low: float  #: lower end of its 95 % Wilson interval
    placebo_high: float  #: its upper end
    least_draws: int  #: draws below which no set can pass, however much it costs
    draws: int | None = None  #: that were run: fewer than asked for where no further one could change a no
    prompts: int | None = None  #: on which they were run
    disjoint_sets: int | None = None  #: that the pool holds beside the tested one; fewer than 5 allow no yes


@dataclasses.dataclass(frozen=True)
class Rule:
    """The rule's numbers.

    Attributes:
      level: probability, at most, with which a run says yes to anything where nothing is true; 0 to 1.
      min_accuracy_drop: share of accuracy that must be lost.
      resamples: of the bootstrap.
      seed: of the bootstrap.
    """

    level: float = LEVEL
    min_accuracy_drop: float = 0.05
    resamples: int = 2000
    seed: int = 456

    def least_draws(self, behaviours: int) -> int:
        """Draws below which no set can pass, however much it costs."""
        return int(np.ceil(behaviours / self.level - 1e-9)) - 1


def claims(effects: Mapping[str, SetEffects], rule: Rule) -> dict[str, Claim]:
    """Applies the rule to the behaviours of a run, and to their draws.

    Args:
      effects: by behaviour; finite, with at least 2 draws each. Draws of a behaviour that has fewer stand more than
        once beside those of the others in the placebo rate.
    """
    if min((part.draws for part in effects.values()), default=2) < 2:
        raise ValueError("expected at least 2 draws of each behaviour")
    candidates = [_Candidates(part, rule) for part in effects.values()]
    most = max((part.draws for part in effects.values()), default=0)
    p_BxC = np.array([[each.p_C[0], *np.resize(each.p_C[1:], most)] for each in candidates]).reshape(-1, 1 + most)
    found = {}
    for (name, part), each, adjusted in zip(effects.items(), candidates, holm(p_BxC), strict=True):
        adjusted_C = adjusted[: 1 + part.draws]
        passes_C = each.passes(adjusted_C <= rule.level)
        placebo = binomtest(int(passes_C[1:].sum()), each.draws)
        ends = placebo.proportion_ci(method="wilson")
        low, high = each.interval(0)
        found[name] = Claim(
            yes=bool(passes_C[0]),
            p_logit_diff=float(each.p_drop_C[0]),
            p_accuracy=float(each.p_lost_C[0]),
            p_holm=float(adjusted_C[0]),
            behaviours=len(effects),
            low=low,
            high=high,
            placebo_rate=float(passes_C[1:].mean()),
            placebo_low=float(ends.low),
            placebo_high=float(ends.high),
            least_draws=rule.least_draws(len(effects)),
            draws=part.draws,
            prompts=len(part.drop_P),
            disjoint_sets=part.disjoint,
        )
    return found


def blocks(draws: int) -> list[slice]:
    """The draws in the order in which they are run, an eighth first, then as many again: after each one may stop.

    The first block holds at least 20, so that there is something to say of where the tested set stands.
    """
    ends = [draws // share for share in (8, 4, 2) if draws // share >= 20] + [draws]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def run_draws(
    without: Callable[[slice], np.ndarray], effects: Callable[[np.ndarray], SetEffects], draws: int, rule: Rule
) -> tuple[np.ndarray, SetEffects]:
    """Measures draws block by block, until all are there or none that is left could change a no.

    Args:
      without: measures those at some places; a row for each.
      effects: what the rule asks about, given all rows so far.
      draws: that are asked for in all.

    Returns:
      The rows, and the effects of all of them.
    """
    parts: list[np.ndarray] = []
    for block in blocks(draws):
        parts.append(without(block))
        found = effects(np.concatenate(parts))
        if settled_no(found, draws, rule):
            break
    return np.concatenate(parts), found


def settled_no(effects: SetEffects, draws: int, rule: Rule) -> bool:
    """Whether the answer is no whatever the draws that are left cost.

    Args:
      effects: with the draws that were run.
      draws: that were asked for in all.
    """
    too_small = not effects.lost_P.mean() > rule.min_accuracy_drop
    return too_small or any(
        1 + as_large(drop_P.mean(), draw_NxP.mean(axis=1)) > rule.level * (1 + draws)
        for drop_P, draw_NxP in ((effects.drop_P, effects.draw_drop_NxP), (effects.lost_P, effects.draw_lost_NxP))
    )


class _Candidates:
    """The tested set (candidate 0) and the draws, each judged beside all draws but itself; C is 1 + N."""

    def __init__(self, effects: SetEffects, rule: Rule):
        self.draws, self._rule, self._disjoint = effects.draws, rule, effects.disjoint
        self._over = Resampling.of(effects.template_P, rule.resamples, rule.seed)
        self._drop_CxP = np.concatenate([effects.drop_P[None], effects.draw_drop_NxP]).astype(np.float64)
        lost_CxP = np.concatenate([effects.lost_P[None], effects.draw_lost_NxP]).astype(np.float64)
        if not np.isfinite(self._drop_CxP).all() or not self._drop_CxP.shape[1]:
            raise ValueError(f"expected finite effects on at least one prompt: got {self._drop_CxP.shape}")
        self._lost_C = lost_CxP.mean(axis=1)
        self.p_drop_C = randomisation_p(self._drop_CxP.mean(axis=1))
        self.p_lost_C = randomisation_p(self._lost_C)

    @property
    def p_C(self) -> np.ndarray:
        """The larger of both p of each candidate."""
        return np.maximum(self.p_drop_C, self.p_lost_C)

    def passes(self, small_C: np.ndarray) -> np.ndarray:
        """Which candidates pass, of those whose adjusted p is small; intervals are computed for these alone."""
        passes_C = small_C & (self._lost_C > self._rule.min_accuracy_drop)
        if self._disjoint is not None and self._disjoint < LEAST_SETS:
            passes_C = np.zeros_like(passes_C)
        for candidate in np.flatnonzero(passes_C):
            passes_C[candidate] = self.interval(int(candidate))[0] > 0
        return passes_C

    def interval(self, candidate: int) -> tuple[float, float]:
        """The 95 % bootstrap interval of a candidate's drop minus the mean drop of the other draws."""
        others_CxP = np.delete(self._drop_CxP, [0, candidate], axis=0)
        found = self._over.mean(self._drop_CxP[candidate] - others_CxP.mean(axis=0))
        return found.low, found.high


def randomisation_p(effect_C: np.ndarray) -> np.ndarray:
    """(1 + draws that cost at least as much) / (1 + draws) of each candidate, [C].

    Args:
      effect_C: mean effects; the first is that of the tested set, the others are those of the draws. A draw is compared
        with all other draws, not with the tested set.
    """
    tested, draws_N = effect_C[0], effect_C[1:]
    own = (1 + as_large(tested, draws_N)) / (1 + len(draws_N))
    return np.concatenate([[own], as_large(draws_N, draws_N) / len(draws_N)])  # a draw counts itself: the 1 is in it


def as_large(value: np.ndarray, draws_N: np.ndarray) -> np.ndarray:
    """How many draws cost at least as much as each value; equal but for rounding is at least as much."""
    rounding = _ROUNDING * max(np.abs(value).max(initial=0.0), np.abs(draws_N).max(initial=0.0), 1e-300)
    return len(draws_N) - np.searchsorted(np.sort(draws_N), value - rounding, side="left")


def spread_over(templates: Sequence[str], count: int) -> np.ndarray:
    """Return the places of ``count`` prompts, evenly spread over their templates, rising; of all for 0."""
    order_P = np.argsort(np.asarray(templates), kind="stable")
    if not 0 < count < len(order_P):
        return np.arange(len(order_P))
    return np.sort(order_P[np.arange(count) * len(order_P) // count])
