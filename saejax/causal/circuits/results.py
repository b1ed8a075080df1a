"""What the tests of a set of features as a circuit found; ``hypotheses`` says what they test."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class CircuitTest:
    """A hypothesis test; all None where no feature of the set fires.

    Attributes:
      statistic: None where nothing defines it.
      p_value: of the null hypothesis.
      p_holm: after Holm's correction for five tests.
      rejected: whether p_holm is at most 0.05.
      verdict: whether that is what a circuit does.
    """

    statistic: float | None
    p_value: float | None
    p_holm: float | None
    rejected: bool | None
    verdict: bool | None


@dataclasses.dataclass(frozen=True)
class CircuitFeature:
    """A feature of the set.

    Attributes:
      feature: its number.
      change: of the kept set's score without it: mean size over prompts, logits.
      p_value: that this is no more than a random added feature's.
      p_holm: after Holm's correction for all features.
      minimal: whether p_holm is at most 0.05.
    """

    feature: int
    change: float
    p_value: float
    p_holm: float
    minimal: bool


@dataclasses.dataclass(frozen=True)
class CircuitResult:
    """A set of features as a circuit, on the test prompts; figures are None where none of it fires.

    Attributes:
      n: features in the set.
      firing: those that fire on test prompts, or on those that lend replacements.
      clean: mean logit difference of the model.
      kept: of the set alone, all others that fire removed.
      removed: without the set.
      tests: equivalence, independence, minimality, sufficiency and necessity.
      features: one by one.
    """

    n: int
    firing: int
    clean: float | None
    kept: float | None
    removed: float | None
    tests: Mapping[str, CircuitTest]
    features: tuple[CircuitFeature, ...]
