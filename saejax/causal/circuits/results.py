"""What the tests of a set of features as a circuit found; ``hypotheses`` says what they test."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from saejax.results import Interval

Answer = Literal["shown", "refuted", "inconclusive"]


@dataclasses.dataclass(frozen=True)
class CircuitTest:
    """A claim that a circuit makes, tested; all None where no feature of the set fires."""

    statistic: float | None  #: what the claim is of
    p_value: float | None  #: of its opposite; None of independence, which no test can show
    p_holm: float | None  #: after Holm's correction for the claims that can be shown
    p_against: float | None  #: of a test against the claim, not corrected; None where there is none
    #: shown (p_holm at most 0.05), refuted (p_against at most 0.05) or neither
    answer: Answer | None


@dataclasses.dataclass(frozen=True)
class CircuitFeature:
    """A feature of the set."""

    feature: int  #: its number
    change: float  #: of the kept set's score without it: mean size over prompts, logits
    p_value: float  #: that this is no more than that of an added feature matched to it
    p_holm: float  #: after Holm's correction for all features
    minimal: bool  #: whether p_holm is at most 0.05


@dataclasses.dataclass(frozen=True)
class CircuitScore:
    """An area over the sizes of circuits: CPR or CMD; `sizes` says what they are."""

    own: Interval  #: of circuits by attribution: signed of CPR, its size of CMD
    activity: Interval  #: of circuits of the most active features
    random: Interval  #: of random orders: mean, 2.5th and 97.5th percentile over the draws
    p_value: float  #: that a random order does as well as one by attribution, on the prompts of the draws


@dataclasses.dataclass(frozen=True)
class CircuitSizes:
    """Circuits of more and more features, all others that fire removed."""

    features: int  #: that fire on test prompts, or on those that lend replacements
    sizes: tuple[int, ...]  #: how many are kept, rising to all
    #: of each order (signed attribution, its size, activity) the faithfulness at each size
    faithfulness: Mapping[str, tuple[float, ...]]
    scores: Mapping[str, CircuitScore]  #: cpr and cmd
    reason: str | None  #: why there are none; None where there are


@dataclasses.dataclass(frozen=True)
class CircuitResult:
    """A set of features as a circuit, on the test prompts; figures are None where none of it fires."""

    n: int  #: features in the set
    firing: int  #: those that fire on test prompts, or on those that lend replacements
    clean: float | None  #: mean logit difference of the model
    kept: float | None  #: of the set alone, all others that fire removed
    removed: float | None  #: without the set
    tests: Mapping[str, CircuitTest]  #: equivalence, independence, minimality, sufficiency and necessity
    features: tuple[CircuitFeature, ...]  #: one by one
    sizes: CircuitSizes | None = None  #: circuits of other sizes
