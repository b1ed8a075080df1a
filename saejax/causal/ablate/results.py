"""Results of the stage ``ablate``."""

import dataclasses
from collections.abc import Mapping

from saejax.causal.ablate.importance_results import ImportanceSummary
from saejax.causal.circuits.results import CircuitResult
from saejax.causal.claims import Claim
from saejax.causal.results import ControlMatch, EqualDose, RankedFeature
from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class TopFeature(RankedFeature):
    """A top feature removed by itself."""

    logit_diff_drop: Interval  #: by how much the logit difference falls
    accuracy_drop: Interval  #: by how much accuracy does, a share
    control_drop: float | None  #: mean drop of its three nearest matches; None if it never fires


@dataclasses.dataclass(frozen=True)
class ReadoutChange:
    """A readout of `ablate.readouts`, mean over the test prompts."""

    clean: float  #: with nothing removed
    ablated: float  #: without the top features
    controls: float  #: without matched random ones, mean over the draws
    change: Interval  #: ablated - clean


@dataclasses.dataclass(frozen=True)
class JointAblation:
    """All top features removed together."""

    n: int  #: features
    firing: int  #: those that fire, and so have controls
    clean_accuracy: float  #: on the test prompts, shares
    ablated_accuracy: float  #: on the test prompts, shares
    clean_logit_diff: float  #: mean over them
    logit_diff_drop: Interval  #: clean - ablated
    accuracy_drop: Interval  #: clean - ablated
    #: by name: log_likelihood (of the correct answer's first token, nats), top1 (share of prompts on which it is the
    #: likeliest), kl (from the clean probabilities, nats)
    readouts: Mapping[str, ReadoutChange] | None = None


@dataclasses.dataclass(frozen=True)
class ControlDraws:
    """Sets of matched random features, no top feature among them; p-values rest on other draws (`claim`)."""

    draws: int  #: how many were run, at most 100
    logit_diff_drop: tuple[float, ...]  #: mean over these prompts, of each draw
    accuracy_drop: tuple[float, ...]  #: mean over these prompts, of each draw
    match: ControlMatch  #: how well they match
    prompts: int | None = None  #: test prompts on which they were removed (`ablate.draw_prompts`)
    top_logit_diff_drop: float | None = None  #: of the top features, mean over the same prompts
    top_accuracy_drop: float | None = None  #: of the top features, mean over the same prompts
    disjoint_sets: int | None = None  #: that their pool holds, without a feature in common


@dataclasses.dataclass(frozen=True)
class CurvePoints:
    """What is left without the first so many features."""

    sizes: tuple[int, ...]  #: how many, rising from 0
    logit_diff: tuple[Interval, ...]  #: left, of each size
    accuracy: tuple[Interval, ...]  #: likewise


@dataclasses.dataclass(frozen=True)
class CumulativeCurve:
    """The first 1, 2, 3, ... top features removed together (`ablate.curve`)."""

    draws: int  #: control sets that are followed
    top: CurvePoints  #: without the top features
    controls: CurvePoints  #: without what the control sets match to them, mean of the sets


@dataclasses.dataclass(frozen=True)
class GreedySet:
    """A set grown on train prompts (`ablate.greedy`)."""

    features: tuple[int, ...]  #: in the order in which they were added
    train_drop: tuple[float, ...]  #: of the train prompts' logit difference, at each size
    top: tuple[int, ...]  #: as many top features by attribution
    greedy_drop: tuple[Interval, ...]  #: of the test prompts' logit difference, at each size
    top_drop: tuple[Interval, ...]  #: of as many top features
    difference: tuple[Interval, ...]  #: greedy_drop - top_drop, paired by prompt


@dataclasses.dataclass(frozen=True)
class DoseCurve:
    """What growing sets of a basis's top directions cost, and how much they change."""

    size: int  #: directions in the basis
    top: tuple[int, ...]  #: its top directions, as many as the largest set holds
    sizes: tuple[int, ...]  #: of the sets, rising
    dose: tuple[float, ...]  #: norm of the change at the site, root mean square over test prompts, of each set
    logit_diff_drop: tuple[float, ...]  #: mean over the test prompts, of each set
    kl: tuple[float, ...] | None  #: divergence from the clean predictions on held-out text, nats per token, of each set
    by_norm: EqualDose | None = None  #: beside the features at equal norms; None of the features themselves
    by_kl: EqualDose | None = None  #: beside the features at equal divergences


@dataclasses.dataclass(frozen=True)
class UncomparedBasis:
    """A basis that was not compared."""

    reason: str  #: why, in words
    size: int | None = None  #: directions in the basis, if there is one


@dataclasses.dataclass(frozen=True)
class OtherBehaviour:
    """What removing a behaviour's top features costs another behaviour of the run."""

    logit_diff_drop: Interval  #: on the other's test prompts
    accuracy_drop: Interval  #: on the other's test prompts
    #: share of the logit difference lost on the behaviour itself minus that lost on the other; None where the clean
    #: mean of one of them is not above 0
    share_apart: Interval | None


@dataclasses.dataclass(frozen=True)
class TextEffect:
    """What removing a behaviour's top features does to held-out text."""

    documents: int  #: how many
    tokens: int  #: that were predicted
    clean: float  #: cross-entropy with nothing removed, nats per token
    rise: Interval  #: of cross-entropy, with a 95 % bootstrap interval over documents
    kl: float  #: divergence from the clean predictions, nats per token


@dataclasses.dataclass(frozen=True)
class Grade:
    """An answer."""

    holds: bool | None  #: None: not known, because something was not measured
    reason: str  #: in words


@dataclasses.dataclass(frozen=True)
class Grades:
    """The graded answers, each asking more than the one before."""

    harms: Grade  #: removing the top features costs the behaviour
    beyond_matched: Grade  #: and more than removing matched random features
    beyond_bases: Grade  #: and more than changing the site as much along the top directions of other bases
    selective: Grade  #: and neither the other behaviours of the run nor held-out text
    highest: str  #: the name of the last that holds with all before it; "none"


@dataclasses.dataclass(frozen=True)
class RepeatedTest:
    """Another training's top features, tested in the same way (`ablate.repeats`)."""

    features: tuple[int, ...]  #: its top features
    joint: JointAblation  #: all of them together
    claim: Claim  #: beside draws of its own, as if the behaviour were alone in its run
    harms: Grade  #: removing them costs the behaviour
    beyond_matched: Grade  #: and more than removing matched random features


@dataclasses.dataclass(frozen=True)
class BehaviourAblation:
    """Which features cause a behaviour; also in `<behaviour>.json`, judged there as if it were alone in its run."""

    top: tuple[TopFeature, ...]  #: the top features, one by one
    rows: int  #: of the model that were run
    joint: JointAblation  #: all of them together
    controls: ControlDraws  #: as many matched random ones, together
    difference: Interval  #: joint drop of the logit difference minus the controls' mean drop, paired by prompt
    percentile: float  #: share of the draws with a smaller drop
    grades: Grades  #: the four answers
    claim: Claim | None = None  #: what `beyond_matched` rests on, and the placebo rate
    curve: CumulativeCurve | None = None  #: of growing sets
    #: by basis: features (the tested ones), neurons (of the layer's MLP; the first token is left alone), components
    #: (principal, of the site on the train prompts; removing one sets it to the mean), random (an untrained TopK
    #: dictionary, as sparse as the tested one), difference (of the site's means by answer), or a dictionary's folder
    doses: Mapping[str, DoseCurve | UncomparedBasis] | None = None
    others: Mapping[str, OtherBehaviour] | None = None  #: the other behaviours of the run, by name
    text: TextEffect | None = None  #: held-out text
    greedy: GreedySet | None = None  #: a set grown on train prompts
    circuit: CircuitResult | None = None  #: the top features tested as a circuit (`ablate.circuit_tests`)
    importance: ImportanceSummary | None = None  #: of all features
    repeats: Mapping[str, RepeatedTest] | None = None  #: by the name of the other training
    #: whether it harms, and goes beyond matched features, in all trainings; the largest p, corrected for the behaviours
    holds_again: Grade | None = None

    @property
    def trainings(self) -> tuple[RepeatedTest, ...]:
        """The tested training as the others are told, then those."""
        assert self.claim
        features = tuple(entry.feature for entry in self.top)
        own = RepeatedTest(features, self.joint, self.claim, self.grades.harms, self.grades.beyond_matched)
        return (own, *(self.repeats or {}).values())


@dataclasses.dataclass(frozen=True)
class AblateResults:
    """The causal test of a dictionary."""

    dictionary: str  #: its name
    site: str  #: that it writes to, or reads
    rule: str  #: of the answers, in words
    replacement: str  #: what stands in a removed feature's place
    top: int  #: features chosen
    draws: int  #: of control sets, at most
    behaviours: Mapping[str, BehaviourAblation]  #: by name
