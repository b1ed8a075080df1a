"""Results of the stage ``probe``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class ProbeFit:
    """A linear probe."""

    input: str  #: what it reads: "features" or "raw"
    k: int | None  #: how many features or dimensions it sees; None: all
    strength: float  #: the inverse strength of the penalty (C of scikit-learn)
    inputs: tuple[int, ...] | None  #: those that a sparse probe sees, best first; None for all
    #: accuracy of probes of as many random inputs: mean, 5th and 95th percentile; None for all
    random: Interval | None
    accuracy: Interval  #: on test prompts, with its 95 % Wilson interval
    balanced_accuracy: float  #: mean over classes
    #: area under the ROC curve on test prompts, 95 % score interval (Newcombe, 2006); None unless there are two classes
    auc: Interval | None
    majority: float  #: accuracy of always naming the largest train class
    shuffled: Interval  #: that of probes of shuffled train labels: mean, 5th and 95th percentile
    auc_shuffled: Interval | None  #: the same of the area under the ROC curve
    #: accuracy less that of the dense probe, of all raw activations, paired by test prompt; None of that probe itself
    against_dense: Interval | None
    p_value: float  #: permutations of the test labels, one-sided, not adjusted for the number of probes


@dataclasses.dataclass(frozen=True)
class ProbedLabel:
    """The probes of a label; also in `<label>.json` or `<label>-<behaviour>.json`."""

    label: str  #: its name
    behaviour: str  #: whose prompts; "" for those of all
    reason: str | None  #: why there is no probe; None where there is
    classes: Mapping[str, Mapping[str, int]]  #: class -> its prompts by split
    left_out: Mapping[str, int]  #: prompts of classes with fewer than 5 train prompts, by class
    unlabelled: int  #: prompts without such a label
    #: of `number`: prompts whose noun beside the verb was given the subject's number, half of those of agreement; 0:
    #: that noun, if there is one, may give the number away
    congruent: int
    unread: int  #: prompts without a position that the dictionary reads: their inputs are 0
    probes: tuple[ProbeFit, ...]  #: none if there is a reason


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """What can be read off a dictionary's features, and off raw activations."""

    dictionary: str  #: its name
    site: str  #: that it reads: of a transcoder, its input
    pool: str  #: over positions: last, max or mean
    labels: tuple[ProbedLabel, ...]  #: each of all prompts or of a behaviour
