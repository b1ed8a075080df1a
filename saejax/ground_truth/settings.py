"""Settings of the synthetic world on which dictionaries are judged."""

import dataclasses

from saejax.config import Config, setting

CONTROLS = "controls"  # the unit of dictionaries that have learned no directions


@dataclasses.dataclass(frozen=True)
class TruthConfig(Config):
    """A synthetic world: vectors that are sparse sums of known directions, on which dictionaries are judged.

    Features are numbered by how often they fire. The first are the roots of the hierarchy's trees, then come all their
    children, and so on; features beyond the trees fire by themselves. ``configs/synthsaebench-16k.flags`` has the
    settings of SynthSAEBench-16k.
    """

    features: int = setting(0, "number of directions of the synthetic world; 0: no world", low=0)
    dimensions: int = setting(256, "width of its vectors", low=2)
    samples: int = setting(1_000_000, "vectors to train on, --train.epochs times over", low=1)
    held_out: int = setting(100_000, "further vectors, on which dictionaries are judged", low=100)
    seed: int = setting(42, "seed of the world and of its vectors", low=0, high=2**31 - 1)
    rates: tuple[float, ...] = setting((0.4, 5e-4), "rates of the first and of the last feature", low=0.0, high=1.0)
    roots: int = setting(8, "trees of the hierarchy, in which a feature fires only with its parent; 0: none", low=0)
    depth: int = setting(3, "generations below a tree's root", low=0)
    factors: int = setting(25, "hidden factors that make features fire together; 0: independent", low=0)
    correlation: float = setting(0.1, "standard deviation of features' loadings on the factors", low=0.0, high=1.0)
    noise: float = setting(0.0, "standard deviation of noise in every dimension", low=0.0)
    # The rest of the benchmark's construction, which no flag changes.
    rate_exponent: float = 0.5  #: feature i fires at a rate of i^-exponent, rescaled to lie between the rates above
    branching: int = 4  #: children of a feature in a tree
    exclusive: bool = True  #: at most one of a feature's children fires at a time
    scaled: bool = True  #: a child's activation is multiplied by its parent's, relative to the parent's mean
    magnitude_first: float = 5.0  #: mean activation of the first feature where it fires
    magnitude_last: float = 4.0  #: the same of the last feature; the others are interpolated linearly
    magnitude_std: float = 0.5  #: standard deviation of a feature's activation, mean over features
    magnitude_spread: float = 0.5  #: standard deviation over features of ``magnitude_std``
    orthogonalise: int = 100  #: steps of Adam that make directions more orthogonal
    bias: float = 0.5  #: norm of a fixed vector that is added to all vectors
