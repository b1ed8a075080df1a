"""Results of the stage ``ground_truth``."""

import dataclasses

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class FoundFeatures:
    """How well a dictionary's features are those of the world; each score with its 95 % t interval over seeds.

    Shares are those of the directions that fire on more than `truth.frequent` of the held-out vectors.
    """

    recovered: Interval  #: share whose feature has a cosine above 0.9, each direction with a feature of its own
    mcc: Interval  #: mean cosine of features and directions, matched one to one (the Hungarian method)
    f1: Interval  #: of when a direction is there and when the feature that is matched to it fires, mean
    f1_features: (
        Interval  #: the same of every feature with its nearest direction, mean over all features (SynthSAEBench)
    )
    uniqueness: Interval  #: number of different nearest directions, over the features
    split: Interval  #: share that two features or more have most of their length along
    merged: Interval  #: share whose nearest feature is close to another direction, too, and its nearest
    absorbed: Interval  #: share whose feature is silent where a child's fires, which carries the parent's direction
    l0: Interval  #: features that fire on a vector, mean
    dead: Interval  #: of the features, share that never fires
    explained_variance: Interval  #: of the vectors
    best_f1: Interval  #: `f1` of the world's own largest activations, as many as `l0` says
    best_explained_variance: Interval  #: `explained_variance` of those, decoded by the true directions
    invented: Interval | None = None  #: of the features that fire, share that has no direction with a cosine above 0.71


@dataclasses.dataclass(frozen=True)
class JudgedDictionary:
    """Dictionaries that differ in nothing but their seed, judged together."""

    name: str  #: of the members without their seeds; "" if nothing else is swept
    control: str  #: "frozen" (a random decoder that stays), "untrained", or ""
    seeds: tuple[int, ...]  #: of training
    scores: FoundFeatures  #: over these seeds


@dataclasses.dataclass(frozen=True)
class WorldFacts:
    """The synthetic world, as the held-out vectors have it."""

    features: int  #: directions
    frequent: int  #: of them those that fire on more than `truth.frequent` of the vectors
    dimensions: int  #: width of a vector
    l0: float  #: directions in a vector, mean
    nearest_cosine: float  #: of a direction with the one nearest to it, without sign, mean


@dataclasses.dataclass(frozen=True)
class TruthResults:
    """Dictionaries of one kind, or controls, beside the synthetic world that they were trained on."""

    kind: str  #: of the dictionaries
    features: int  #: of each
    samples: int  #: vectors that each was trained on, repeats counted
    held_out: int  #: vectors that each was judged on
    world: WorldFacts  #: what was to be found
    dictionaries: tuple[JudgedDictionary, ...]  #: in the order of the stack
