"""Results of the stage ``evaluate``."""

import dataclasses
from collections.abc import Mapping

from saejax.activations.results import SinkCounts

DENSE_ABOVE = 0.1  # share of tokens: a feature that fires on more counts as dense


@dataclasses.dataclass(frozen=True)
class LeftOutSinks(SinkCounts):
    """Tokens that the sink rule left out of the scores."""

    max_norm: float  #: the rule: positions with a longer activation


@dataclasses.dataclass(frozen=True)
class NeighbourCosines:
    """Cosine of each decoder row with its nearest, over the features."""

    mean: float  #: of the cosines
    median: float  #: of the cosines
    p90: float  #: of the cosines
    p99: float  #: of the cosines
    max: float  #: of the cosines
    near: float  #: share of the features whose neighbour is above 0.9
    looked_at: int | None = None  #: how many features, where it is not all of them


@dataclasses.dataclass(frozen=True)
class StandInMeans:
    """A loss of the model with something else in the place of the site's activations; means over tokens, nats."""

    clean: float  #: with nothing changed
    reconstructed: float  #: with the dictionary's reconstruction
    mean_ablated: float  #: with the mean over training tokens
    zero_ablated: float  #: with zeros
    tokens: int | None = None  #: predicted ones; of the cross-entropy


@dataclasses.dataclass(frozen=True)
class DensityHistogram:
    """Histogram of features by the share of tokens on which they fire."""

    log10_edges: tuple[float, ...]  #: of the bins, n + 1 up to 0, of one width
    counts: tuple[int, ...]  #: of features, n
    never: int  #: features that fire on no token


@dataclasses.dataclass(frozen=True)
class PartScores:
    """A crosscoder at one part of its joined site."""

    explained_variance: float  #: of the part
    ce: StandInMeans  #: next-token cross-entropy of the part's model, with this part alone replaced
    kl: StandInMeans  #: the same of KL divergence from that model
    ce_recovered_mean: float | None  #: as of a dictionary of one site
    kl_recovered_mean: float | None  #: share of KL recovered against the mean
    private: int  #: live features written here alone: relative norms of their decoder rows above 0.9
    relative_norms: tuple[int, ...]  #: live features by relative norm here: 20 bins from 0 to 1 (here alone)


@dataclasses.dataclass(frozen=True)
class DictionaryScores:
    """A dictionary on held-out text; also in ``scores.json``."""

    name: str  #: the member of its stack; "" for one alone
    site: str  #: read
    target: str  #: rebuilt or predicted
    tokens: int  #: held-out ones, sinks left out
    explained_variance: float  #: 1 - sum |x - x_hat|^2 / sum |x - mean|^2, fp64 sums
    fvu: float  #: 1 - that
    cosine: float  #: of activations and reconstruction, mean over tokens
    l0: float  #: features active per token, mean
    dead_fraction: float  #: of the features, those that fire on no held-out token
    dense_fraction: float  #: those that fire on more than 10 % of them
    decoder_neighbours: NeighbourCosines | None  #: None for a single feature
    #: next-token cross-entropy; of a crosscoder, that of the first model with all its parts replaced at once
    ce: StandInMeans
    kl: StandInMeans  #: KL divergence from the clean model
    #: (mean_ablated - reconstructed) / (mean_ablated - clean) of `ce`; None where ablation does no harm
    ce_recovered_mean: float | None
    ce_recovered_zero: float | None  #: the same against zeros
    kl_recovered_mean: float | None  #: the same of `kl`
    kl_recovered_zero: float | None  #: the same of `kl`
    density_histogram: DensityHistogram  #: of firing rates
    sinks: LeftOutSinks  #: left out, at the site
    target_sinks: LeftOutSinks | None = None  #: at the target, if that is another site
    parts: Mapping[str, PartScores] | None = None  #: of a crosscoder, by part
    shared: int | None = None  #: of a crosscoder: live features with a relative norm between 0.4 and 0.6


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """A layer of a cross-layer transcoder on held-out text."""

    layer: int  #: its number
    explained_variance: float  #: of what its MLP adds, by all that is written there from it and from below
    cosine: float  #: of the two, mean over tokens
    l0: float  #: its own features that are active per token, mean
    dead_fraction: float  #: of its features, those that fire on no held-out token
    dense_fraction: float  #: those that fire on more than 10 % of them


@dataclasses.dataclass(frozen=True)
class CrossLayerScores:
    """A cross-layer transcoder on held-out text; also in ``scores.json``."""

    tokens: int  #: held-out ones; those that are sinks at any layer are left out
    explained_variance: float  #: mean over the layers
    l0: float  #: features of all layers active per token, mean
    dead_fraction: float  #: of all features
    layers: tuple[LayerScores, ...]  #: from the first on
    #: next-token cross-entropy with all MLPs replaced at once, features read in the stream that this gives; the floors
    #: replace them by what they add on average, and by nothing
    ce: StandInMeans
    kl: StandInMeans  #: KL divergence from the clean model, likewise
    ce_recovered_mean: float | None  #: (mean_ablated - reconstructed) / (mean_ablated - clean) of `ce`
    kl_recovered_mean: float | None  #: the same of `kl`


@dataclasses.dataclass(frozen=True)
class EvaluateResults:
    """The members of a train unit on held-out text."""

    kind: str  #: of the dictionaries
    members: tuple[DictionaryScores, ...]  #: in their order; none of a cross-layer transcoder
    cross_layer: CrossLayerScores | None = None  #: of a cross-layer transcoder
