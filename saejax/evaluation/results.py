"""Results of the stage ``evaluate``."""

import dataclasses

from saejax.activations.results import SinkCounts


@dataclasses.dataclass(frozen=True)
class LeftOutSinks(SinkCounts):
    """What the sink rule left out of the scores.

    Attributes:
      max_norm: the rule: positions with a longer activation.
    """

    max_norm: float


@dataclasses.dataclass(frozen=True)
class NeighbourCosines:
    """Cosine of each decoder row with its nearest, over the features.

    Attributes:
      mean, median, p90, p99, max: of the cosines.
      near: share of the features whose neighbour is above 0.9.
    """

    mean: float
    median: float
    p90: float
    p99: float
    max: float
    near: float


@dataclasses.dataclass(frozen=True)
class StandInMeans:
    """A loss of the model with something else in the place of the site's activations; means over tokens, nats.

    Attributes:
      clean: with nothing changed.
      reconstructed: with the dictionary's reconstruction.
      mean_ablated: with the mean over training tokens.
      zero_ablated: with zeros.
      tokens: predicted ones; of the cross-entropy.
    """

    clean: float
    reconstructed: float
    mean_ablated: float
    zero_ablated: float
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class DensityHistogram:
    """How many features fire on what share of the tokens.

    Attributes:
      log10_edges: of the bins, n + 1 up to 0, of one width.
      counts: of features, n.
      never: features that fire on no token.
    """

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    never: int


@dataclasses.dataclass(frozen=True)
class DictionaryScores:
    """A dictionary on held-out text; also in ``scores.json``.

    Attributes:
      name: the member of its stack; "" for one alone.
      site: read.
      target: rebuilt or predicted.
      tokens: held-out ones, sinks left out.
      explained_variance: 1 - sum |x - x_hat|^2 / sum |x - mean|^2, fp64 sums.
      fvu: 1 - that.
      cosine: of activations and reconstruction, mean over tokens.
      l0: features active per token, mean.
      dead_fraction: of the features, those that fire on no held-out token.
      dense_fraction: those that fire on more than `evaluate.dense_above` of them.
      decoder_neighbours: None for a single feature.
      ce: next-token cross-entropy.
      kl: KL divergence from the clean model.
      ce_recovered_mean: (mean_ablated - reconstructed) / (mean_ablated - clean) of `ce`; None where ablation does no
        harm.
      ce_recovered_zero: the same against zeros.
      kl_recovered_mean, kl_recovered_zero: the same of `kl`.
      density_histogram: of firing rates.
      sinks: left out, at the site.
      target_sinks: at the target, if that is another site.
    """

    name: str
    site: str
    target: str
    tokens: int
    explained_variance: float
    fvu: float
    cosine: float
    l0: float
    dead_fraction: float
    dense_fraction: float
    decoder_neighbours: NeighbourCosines | None
    ce: StandInMeans
    kl: StandInMeans
    ce_recovered_mean: float | None
    ce_recovered_zero: float | None
    kl_recovered_mean: float | None
    kl_recovered_zero: float | None
    density_histogram: DensityHistogram
    sinks: LeftOutSinks
    target_sinks: LeftOutSinks | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateResults:
    """The members of a train unit on held-out text.

    Attributes:
      kind: of the dictionaries.
      members: in their order.
    """

    kind: str
    members: tuple[DictionaryScores, ...]
