"""Results of the stage ``crosscode``."""

import dataclasses
from collections.abc import Mapping

from saejax.causal.claims import Claim
from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class PrivateFeature:
    """A feature that is one part's own by its norms, and what latent scaling says of it."""

    feature: int  #: its index
    part: str  #: whose own it seems to be
    relative_norm: float  #: 1: its row is in this part alone, 0.5: as long in another; see `crosscode/norms.py`
    firing_rate: float  #: share of held-out tokens
    #: how much of it the other part's error holds (`crosscode/scaling.py`), interval over blocks of documents; None:
    #: it does not vary with the feature
    nu_error: Interval | None
    nu_reconstruction: Interval | None  #: the same of reconstructions
    nu_null: float | None  #: of errors, with its activations moved along the text
    private: bool  #: whether both upper ends lie below `crosscode.nu_error` and `crosscode.nu_reconstruction`


@dataclasses.dataclass(frozen=True)
class PartFeatures:
    """The features that seem to be one part's own."""

    by_norms: int  #: alive, with a relative norm above `crosscode.private`
    measured: int  #: of them, those that latent scaling looked at
    private: int  #: of these, those that it does not contradict
    nu_error: float | None  #: of them, median
    nu_reconstruction: float | None  #: of them, median
    nu_null: float | None  #: of them with activations moved along the text, 95th percentile


@dataclasses.dataclass(frozen=True)
class CrosscodeBehaviour:
    """What removing a part's private features from its model costs a behaviour, beside matched shared ones."""

    part: str  #: whose own they are, and from which they are removed
    features: tuple[int, ...]  #: those that were removed together
    drop: Interval  #: of the logit difference in that model
    matched_drop: float  #: the same of drawn sets of shared and tested features, mean
    other_drop: float | None  #: the same removal from the other model's part: what is private is not there
    claim: Claim  #: what the rule says


@dataclasses.dataclass(frozen=True)
class CrosscodedDictionary:
    """Which features of a crosscoder its parts share."""

    name: str  #: such as "batchtopk/k32", or its folder
    site: str  #: joined
    parts: tuple[str, ...]  #: of it
    features: int  #: all of them
    alive: int  #: those that fire on held-out text
    tokens: int  #: of that text
    same_space: bool  #: whether latent scaling looked along the feature's own direction, or in any
    shared: int  #: alive, about as long in both parts: a relative norm from 0.4 to 0.6
    histogram: tuple[int, ...]  #: alive features by the relative norm in the first part, 20 bins from 0 to 1
    own: Mapping[str, PartFeatures]  #: by part
    control: PartFeatures  #: shared features that fire as often as those, judged by the same rule: it should pass none
    listed: tuple[PrivateFeature, ...]  #: private ones first, those that fire most often first
    behaviours: Mapping[str, CrosscodeBehaviour]  #: by "part: behaviour"; only of two models
    left_out: Mapping[str, str]  #: what was not tested, and why


@dataclasses.dataclass(frozen=True)
class CrosscodeResults:
    """What crosscoders say of layers, or of two models."""

    rule: str  #: when a feature counts as private, and when removing some costs a behaviour, in words
    dictionaries: tuple[CrosscodedDictionary, ...]  #: in the order of the flag
