"""Reconstruction error and sparsity of dictionaries on held-out activations."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, losses
from saejax.errors import UserError
from saejax.evaluation.member_data import MemberData
from saejax.evaluation.results import DENSE_ABOVE, DensityHistogram
from saejax.parallel.mesh import by_row, document_devices


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Scores over N tokens. y is the dictionary's target: its input, or a transcoder's target."""

    tokens: int  #: N
    #: 1 - sum |y - y_hat|^2 / sum |y - mean|^2 (R^2 over all dimensions, sums in fp64); 0 where y is constant
    explained_variance: float
    cosine: float  #: mean over tokens of the cosine of y and y_hat; 0 where either is 0
    l0: float  #: mean number of features that fire on a token
    firing_rate_F: np.ndarray  #: share of tokens on which each feature fires
    #: mean activation of each feature over the tokens on which it fires, of its size in a linear dictionary; 0 if it
    #: never does.
    mean_activation_F: np.ndarray

    @property
    def dead_fraction(self) -> float:
        """Share of features that never fire on these tokens."""
        return float(np.mean(self.firing_rate_F == 0))

    @property
    def dense_fraction(self) -> float:
        """Share of features that fire on more than a tenth of the tokens."""
        return float(np.mean(self.firing_rate_F > DENSE_ABOVE))

    def figures(self) -> dict[str, Any]:
        """Return the fields that results about a dictionary and about a layer share."""
        return dict(
            explained_variance=self.explained_variance,
            cosine=self.cosine,
            l0=self.l0,
            dead_fraction=self.dead_fraction,
            dense_fraction=self.dense_fraction,
        )

    def density_histogram(self) -> DensityHistogram:
        """Count features by log10 of the firing rate, 4 bins a decade; features that never fire are counted apart."""
        lowest = min(np.floor(np.log10(1 / self.tokens)), -1.0)  # of one token, too, there is a bin
        edges = np.linspace(lowest, 0, round(-lowest * 4) + 1)
        rates = self.firing_rate_F[self.firing_rate_F > 0]
        counts, _ = np.histogram(np.clip(np.log10(rates), edges[0], 0), edges)
        return DensityHistogram(tuple(edges.tolist()), tuple(counts.tolist()), int(np.sum(self.firing_rate_F == 0)))


def reconstruct(
    dictionaries: Sequence[Dictionary], blocks: Iterable[Sequence[np.ndarray]], mesh: Mesh, batch: int = 4096
) -> list[Reconstruction]:
    """Score dictionaries that read the same activations, in one pass over these.

    Args:
      dictionaries: dictionaries of one kind and shape; one program scores them all.
      blocks: activations, attention sinks left out: (inputs [n, d],), or (inputs, targets) for transcoders; any n.
      mesh: tokens are split over ``member`` and ``data``, features over ``model``.
      batch: tokens per run of the program; the last batch is filled up with rows that do not count.

    Returns:
      The scores of each dictionary.

    Raises:
      UserError: there are no activations, or a reconstruction is not finite.
    """
    members = MemberData.of(dictionaries, mesh)
    spread = Spread(dictionaries[0].config.d_out)
    sums = [Sums(dictionary.config.n_features) for dictionary in dictionaries]
    batch += -batch % document_devices(mesh)  # or each device would score all tokens
    for parts, count in batches(blocks, batch):
        placed = by_row(mesh, *parts)
        scores = [_score(member, placed[0], placed[-1], count) for member in members]
        # On the host while the devices work: their results are waited for below.
        spread.add(parts[-1][:count])
        for running, score in zip(sums, scores, strict=True):
            running.add(*jax.device_get(score))
    return [running.scores(spread) for running in sums]


class Spread:
    """Sums, in fp64, for the variance of the targets around their mean.

    Attributes:
      tokens: number of targets so far.
      square: sum of |y|^2.
    """

    def __init__(self, width: int):
        self.tokens, self.square, self._total_D = 0, 0.0, np.zeros(width)

    def add(self, y_NxD: np.ndarray) -> None:
        """Add a batch of targets."""
        wide_NxD = y_NxD.astype(np.float64)
        self.tokens += len(wide_NxD)
        self.square += np.square(wide_NxD).sum()
        self._total_D += wide_NxD.sum(0)

    @property
    def variance(self) -> float:
        """Sum over tokens of |y - mean|^2."""
        return self.square - np.square(self._total_D).sum() / max(self.tokens, 1)


class Sums:
    """Running sums of one dictionary's scores."""

    def __init__(self, features: int):
        self._error, self._cosine = 0.0, 0.0
        self._fired_F, self._active_F = np.zeros(features, np.int64), np.zeros(features)

    def add(self, error_B: np.ndarray, cosine_B: np.ndarray, fired_F: np.ndarray, active_F: np.ndarray) -> None:
        """Add the results of a batch, see ``measures``."""
        self._error += error_B.astype(np.float64).sum()
        self._cosine += cosine_B.astype(np.float64).sum()
        self._fired_F += fired_F
        self._active_F += active_F

    def scores(self, spread: Spread) -> Reconstruction:
        """Return the scores; raise a ``UserError`` if there are no tokens, or they are not finite."""
        if not spread.tokens:
            raise UserError("there are no held-out activations to score: raise --corpus.held_out or give more text")
        if not np.isfinite(self._error):
            raise UserError("a reconstruction is not finite: the dictionary holds NaN or overflows; train it again")
        return Reconstruction(
            tokens=spread.tokens,
            explained_variance=float(losses.explained_share(self._error, spread.variance, spread.square)),
            cosine=float(self._cosine / spread.tokens),
            l0=float(self._fired_F.sum() / spread.tokens),
            firing_rate_F=self._fired_F / spread.tokens,
            mean_activation_F=self._active_F / np.maximum(self._fired_F, 1),
        )


@jax.jit
def _score(member: MemberData, x_BxD: jax.Array, y_BxO: jax.Array, count: int) -> tuple[jax.Array, ...]:
    f_BxF = member.encode(x_BxD)
    return measures(f_BxF, member.fires(f_BxF), member.decode(f_BxF, x_BxD), y_BxO, count)


def measures(
    f_BxF: jax.Array, fires_BxF: jax.Array, y_hat_BxO: jax.Array, y_BxO: jax.Array, count: int
) -> tuple[jax.Array, ...]:
    """Return what ``Sums`` adds up for a batch.

    Args:
      f_BxF: activations.
      fires_BxF: where they count as active.
      y_hat_BxO: the reconstruction.
      y_BxO: its target.
      count: number of rows, from the first on, that count.

    Returns:
      Squared error and cosine [B] of each token; how often [F] and how strongly, summed [F], each feature fires.
    """
    counts_Bx1 = jnp.arange(len(y_BxO))[:, None] < count
    y_BxO = y_BxO.astype(y_hat_BxO.dtype)
    # Padding has an error, too: a row of zeros is rebuilt as the decoder's bias.
    error_BxO = jnp.where(counts_Bx1, y_BxO - y_hat_BxO, 0.0)
    lengths_B = jnp.linalg.norm(y_BxO, axis=-1) * jnp.linalg.norm(y_hat_BxO, axis=-1)
    cosine_B = jnp.sum(y_BxO * y_hat_BxO, -1) / jnp.where(lengths_B > 0, lengths_B, 1.0)
    fires_BxF = fires_BxF & counts_Bx1
    return (
        jnp.sum(jnp.square(error_BxO), -1),
        jnp.where(counts_Bx1[:, 0], cosine_B, 0.0),
        jnp.sum(fires_BxF, 0, dtype=jnp.int32),
        # Without their signs: the positive and negative activations of a linear dictionary would cancel.
        jnp.sum(jnp.where(fires_BxF, jnp.abs(f_BxF), 0.0), 0),
    )


def batches(blocks: Iterable[Sequence[np.ndarray]], batch: int) -> Iterator[tuple[list[np.ndarray], int]]:
    """Cut blocks into batches of one shape; yield each with the number of rows that count."""
    for block in blocks:
        for start in range(0, len(block[0]), batch):
            parts = [part[start : start + batch] for part in block]
            count = len(parts[0])
            yield [np.pad(part, ((0, batch - count), (0, 0))) for part in parts], count


def read_blocks(store: Store, split: str, sites: Sequence[str], size: int) -> Iterator[list[np.ndarray]]:
    """Yield blocks of activations at the distinct sites, with the same tokens row by row and without sinks of any site.

    Args:
      store: the activation store.
      split: "train" or "held_out".
      sites: names of the sites.
      size: maximum number of rows of a block.
    """
    yield from read_rows(store, store.rows(split, *dict.fromkeys(sites)), sites, size)


def read_rows(store: Store, rows: np.ndarray, sites: Sequence[str], size: int) -> Iterator[list[np.ndarray]]:
    """Yield blocks of at most ``size`` of these rows at the distinct sites."""
    # The target of an SAE is the site that it reads, which is read once.
    sites = list(dict.fromkeys(sites))
    for start in range(0, len(rows), size):
        yield [store.read(site, rows[start : start + size]) for site in sites]
