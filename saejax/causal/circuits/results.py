"""What the tests of a set of features as a circuit found; ``hypotheses`` says what they test."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

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
class CircuitResult:
    """A set of features as a circuit, on the test prompts; figures are None where none of it fires."""

    n: int  #: features in the set
    firing: int  #: those that fire on test prompts, or on those that lend replacements
    clean: float | None  #: mean logit difference of the model
    kept: float | None  #: of the set alone, all others that fire removed
    removed: float | None  #: without the set
    tests: Mapping[str, CircuitTest]  #: equivalence, independence, minimality, sufficiency and necessity
    features: tuple[CircuitFeature, ...]  #: one by one
