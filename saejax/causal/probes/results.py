"""Results of the stage ``probe``."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class ProbeFit:
    """A linear probe.

    Attributes:
      input: what it reads.
      k: how many features or dimensions it sees; None: all.
      strength: the inverse strength of the penalty (C of scikit-learn).
      inputs: those that a sparse probe sees, best first; None for all.
      random: accuracy of probes of as many random inputs: mean, 5th and 95th percentile; None for all.
      accuracy: on test prompts, with its 95 % Wilson interval.
      balanced_accuracy: mean over classes.
      majority: accuracy of always naming the largest train class.
      shuffled: that of probes of shuffled train labels: mean, 5th and 95th percentile.
      p_value: permutations of the test labels, one-sided, not adjusted for the number of probes.
    """

    input: Literal["features", "raw"]
    k: int | None
    strength: float
    inputs: tuple[int, ...] | None
    random: Interval | None
    accuracy: Interval
    balanced_accuracy: float
    majority: float
    shuffled: Interval
    p_value: float


@dataclasses.dataclass(frozen=True)
class ProbedLabel:
    """The probes of a label; also in `<label>.json` or `<label>-<behaviour>.json`.

    Attributes:
      label: its name.
      behaviour: whose prompts; "" for those of all.
      reason: why there is no probe; None where there is.
      classes: class -> its prompts by split.
      left_out: prompts of classes with fewer than 5 train prompts, by class.
      unlabelled: prompts without such a label.
      unread: prompts without a position that the dictionary reads: their inputs are 0.
      probes: none if there is a reason.
    """

    label: str
    behaviour: str
    reason: str | None
    classes: Mapping[str, Mapping[str, int]]
    left_out: Mapping[str, int]
    unlabelled: int
    unread: int
    probes: tuple[ProbeFit, ...]


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """What can be read off a dictionary's features, and off raw activations.

    Attributes:
      dictionary: its name.
      site: that it reads, or writes to.
      pool: over positions: last, max or mean.
      labels: each of all prompts or of a behaviour.
    """

    dictionary: str
    site: str
    pool: str
    labels: tuple[ProbedLabel, ...]
