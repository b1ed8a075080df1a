"""Results of the stage ``ground_truth``."""

import dataclasses

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class FoundFeatures:
    """Scores of a dictionary against the world; each with its 95 % t interval over seeds.

    Shares are of the directions that are active in more than a ten-thousandth of the held-out vectors.
    """

    recovered: Interval  #: share with a matched feature of absolute cosine above 0.9, one to one
    mcc: Interval  #: mean absolute cosine of features and directions, matched one to one (Hungarian method)
    f1: Interval  #: of a direction being active and its matched feature firing, mean over directions
    f1_features: Interval  #: the same of every feature and its nearest direction, mean over features (SynthSAEBench)
    uniqueness: Interval  #: number of distinct nearest directions, divided by the number of features
    split: Interval  #: share along which at least two features have most of their squared length
    merged: Interval  #: share whose nearest feature is also the nearest of another direction, and close to both
    absorbed: Interval  #: share whose parent latent is absorbed by a child latent
    l0: Interval  #: features that fire on a vector, mean
    dead: Interval  #: share of the features that never fire
    explained_variance: Interval  #: of the vectors
    best_f1: Interval  #: `f1` of the world's largest activations, as many as `l0`
    best_explained_variance: Interval  #: `explained_variance` of these, decoded by the true directions
    invented: Interval | None = None  #: share of the live features with no absolute cosine above 0.71 to any direction


@dataclasses.dataclass(frozen=True)
class JudgedDictionary:
    """Dictionaries that differ only in their seed, scored together."""

    name: str  #: of the members without their seeds; "" if nothing else is swept
    control: str  #: "frozen" (a random decoder that stays), "untrained", or ""
    seeds: tuple[int, ...]  #: of training
    scores: FoundFeatures  #: over these seeds


@dataclasses.dataclass(frozen=True)
class WorldFacts:
    """The synthetic world, measured on the held-out vectors."""

    features: int  #: directions
    frequent: int  #: of these, active in more than a ten-thousandth of the vectors
    dimensions: int  #: width of a vector
    l0: float  #: active directions of a vector, mean
    nearest_cosine: float  #: absolute cosine of a direction with the nearest other, mean


@dataclasses.dataclass(frozen=True)
class TruthResults:
    """Dictionaries of one kind, or controls, compared with the synthetic world that they were trained on."""

    kind: str  #: of the dictionaries
    features: int  #: of each
    samples: int  #: vectors that each was trained on, repeats counted
    held_out: int  #: vectors that each was judged on
    world: WorldFacts  #: what was to be found
    dictionaries: tuple[JudgedDictionary, ...]  #: in the order of the stack
