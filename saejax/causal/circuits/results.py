"""What the tests of a set of features as a circuit found; ``hypotheses`` says what they test."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class CircuitTest:
    """A hypothesis test; all None where no feature of the set fires."""

    statistic: float | None  #: None where nothing defines it
    p_value: float | None  #: of the null hypothesis
    p_holm: float | None  #: after Holm's correction for five tests
    rejected: bool | None  #: whether p_holm is at most 0.05
    verdict: bool | None  #: whether that is what a circuit does


@dataclasses.dataclass(frozen=True)
class CircuitFeature:
    """A feature of the set."""

    feature: int  #: its number
    change: float  #: of the kept set's score without it: mean size over prompts, logits
    p_value: float  #: that this is no more than a random added feature's
    p_holm: float  #: after Holm's correction for all features
    minimal: bool  #: whether p_holm is at most 0.05


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
