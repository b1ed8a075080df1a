"""Results of the stage ``evaluate``."""

import dataclasses
from collections.abc import Mapping

from saejax.activations.results import SinkCounts

DENSE_ABOVE = 0.1  # share of tokens: a feature that fires on more counts as dense


@dataclasses.dataclass(frozen=True)
class LeftOutSinks(SinkCounts):
    """Tokens that the sink rule left out of the scores."""

    max_norm: float  #: sink threshold: positions with a larger norm are attention sinks


@dataclasses.dataclass(frozen=True)
class NeighbourCosines:
    """Cosine of each decoder row with its nearest, over the features."""

    mean: float  #: of the cosines
    median: float  #: of the cosines
    p90: float  #: of the cosines
    p99: float  #: of the cosines
    max: float  #: of the cosines
    near: float  #: share of the features whose neighbour is above 0.9
    looked_at: int | None = None  #: number of compared features, if not all


@dataclasses.dataclass(frozen=True)
class StandInMeans:
    """A loss of the model with something else in the place of the site's activations; means over tokens, nats."""

    clean: float  #: without an edit
    reconstructed: float  #: with the dictionary's reconstruction
    mean_ablated: float  #: with the mean over training tokens
    zero_ablated: float  #: with zeros
    tokens: int | None = None  #: number of predicted tokens; only for the cross-entropy


@dataclasses.dataclass(frozen=True)
class DensityHistogram:
    """Histogram of features by the share of tokens on which they fire."""

    log10_edges: tuple[float, ...]  #: of the bins, n + 1 up to 0, of one width
    counts: tuple[int, ...]  #: of features, n
    never: int  #: features that fire on no token


@dataclasses.dataclass(frozen=True)
class PartScores:
    """A crosscoder at one part of its joined site."""

    explained_variance: float  #: explained variance of this part
    ce: StandInMeans  #: next-token cross-entropy of the part's model, with this part alone replaced
    kl: StandInMeans  #: the same of KL divergence from that model
    ce_recovered_mean: float | None  #: share of cross-entropy recovered against the mean
    kl_recovered_mean: float | None  #: share of KL recovered against the mean
    private: int  #: live features written here alone: relative norms of their decoder rows above 0.9
    #: of these, features that no other part has by latent scaling; None where no other part has this width
    specific: int | None
    relative_norms: tuple[int, ...]  #: live features by relative norm here: 20 bins from 0 to 1 (here alone)


@dataclasses.dataclass(frozen=True)
class RoleScores:
    """A dictionary on the messages of one role in held-out chats."""

    tokens: int  #: number of tokens, attention sinks excluded
    explained_variance: float  #: share of the variance around these tokens' own mean
    cosine: float  #: cosine of activation and reconstruction, mean over these tokens
    l0: float  #: number of features that fire on a token, mean
    dead_fraction: float  #: share of the features that fire on none of these tokens
    dense_fraction: float  #: share of the features that fire on more than 10 % of these tokens
    #: next-token cross-entropy of this role's tokens; None where none of them are in the documents with losses
    ce: StandInMeans | None = None
    kl: StandInMeans | None = None  #: KL divergence from the clean model, where such a token is predicted
    ce_recovered_mean: float | None = None  #: share of cross-entropy recovered against the mean
    kl_recovered_mean: float | None = None  #: share of KL recovered against the mean


@dataclasses.dataclass(frozen=True)
class DictionaryScores:
    """A dictionary on held-out text; also in ``scores.json``."""

    name: str  #: name of the member; "" for a single dictionary
    site: str  #: site that it reads
    target: str  #: site that it reconstructs or predicts
    tokens: int  #: number of held-out tokens, attention sinks excluded
    explained_variance: float  #: 1 - sum |x - x_hat|^2 / sum |x - mean|^2, fp64 sums
    cosine: float  #: cosine of activation and reconstruction, mean over tokens
    l0: float  #: number of features that fire on a token, mean
    dead_fraction: float  #: share of the features that fire on no held-out token
    dense_fraction: float  #: share of the features that fire on more than 10 % of the tokens
    #: cosines of decoder rows with their nearest; None for a single feature
    decoder_neighbours: NeighbourCosines | None
    #: next-token cross-entropy; for a crosscoder, the first model's with all its parts replaced at once
    ce: StandInMeans
    kl: StandInMeans  #: KL divergence from the clean model
    #: (mean_ablated - reconstructed) / (mean_ablated - clean) of `ce`; None where ablation does no harm
    ce_recovered_mean: float | None
    ce_recovered_zero: float | None  #: the same against zero ablation
    kl_recovered_mean: float | None  #: the same of `kl`
    kl_recovered_zero: float | None  #: the same of `kl`
    density_histogram: DensityHistogram  #: histogram of firing rates
    sinks: LeftOutSinks  #: attention sinks at the site, which are not scored
    target_sinks: LeftOutSinks | None = None  #: attention sinks at the target, if that is another site
    parts: Mapping[str, PartScores] | None = None  #: scores of each part of a crosscoder
    #: scores on the messages of each role ("user", "assistant", perhaps "system"); None: the text is of no chats
    roles: Mapping[str, RoleScores] | None = None
    shared: int | None = None  #: number of a crosscoder's live features with a relative norm between 0.4 and 0.6


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """A layer of a cross-layer transcoder on held-out text."""

    layer: int  #: number of the layer
    #: share of the variance of this MLP's output that features of this layer and of lower ones explain
    explained_variance: float
    cosine: float  #: cosine of this MLP's output and its reconstruction, mean over tokens
    l0: float  #: number of this layer's features that fire on a token, mean
    dead_fraction: float  #: share of this layer's features that fire on no held-out token
    dense_fraction: float  #: share of this layer's features that fire on more than 10 % of the tokens


@dataclasses.dataclass(frozen=True)
class CrossLayerScores:
    """A cross-layer transcoder on held-out text; also in ``scores.json``."""

    tokens: int  #: number of held-out tokens, without tokens that are sinks at any layer
    explained_variance: float  #: mean over the layers
    l0: float  #: features of all layers active per token, mean
    dead_fraction: float  #: share of all features that fire on no held-out token
    layers: tuple[LayerScores, ...]  #: scores of each layer, from the first on
    #: next-token cross-entropy with all MLPs replaced at once, features read in the stream that this gives; the floors
    #: replace them by what they add on average, and by nothing
    ce: StandInMeans
    kl: StandInMeans  #: KL divergence from the clean model, likewise
    ce_recovered_mean: float | None  #: (mean_ablated - reconstructed) / (mean_ablated - clean) of `ce`
    kl_recovered_mean: float | None  #: the same of `kl`


@dataclasses.dataclass(frozen=True)
class EvaluateResults:
    """The members of a train unit on held-out text."""

    kind: str  #: kind of the dictionaries
    members: tuple[DictionaryScores, ...]  #: scores of each member, in their order; none of a cross-layer transcoder
    cross_layer: CrossLayerScores | None = None  #: scores of a cross-layer transcoder
