"""How well a dictionary rebuilds held-out activations, and how sparsely."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.parallel import fitting_sharding, sharding


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Scores over N tokens.

    Attributes:
      tokens: N.
      explained_variance: 1 - sum |x - x_hat|^2 / sum |x - mean|^2 (R^2 over all dimensions, sums in fp64).
      l0: mean number of features that fire on a token.
      firing_rate_F: share of tokens on which each feature fires.
      mean_activation_F: mean activation of each feature over the tokens on which it fires; 0 if it never does.
    """

    tokens: int
    explained_variance: float
    l0: float
    firing_rate_F: np.ndarray
    mean_activation_F: np.ndarray

    @property
    def dead_fraction(self) -> float:
        """Share of features that never fire on these tokens."""
        return float(np.mean(self.firing_rate_F == 0))

    def dense_fraction(self, above: float) -> float:
        """Share of features that fire on more than this share of the tokens."""
        return float(np.mean(self.firing_rate_F > above))

    def density_histogram(self, bins_per_decade: int = 4) -> dict:
        """Counts of features by log10 of the firing rate; features that never fire are counted apart."""
        lowest = np.floor(np.log10(1 / self.tokens))
        edges = np.linspace(lowest, 0, round(-lowest * bins_per_decade) + 1)
        rates = self.firing_rate_F[self.firing_rate_F > 0]
        counts, _ = np.histogram(np.clip(np.log10(rates), edges[0], 0), edges)
        return dict(log10_edges=edges.tolist(), counts=counts.tolist(), never=int(np.sum(self.firing_rate_F == 0)))


def reconstruct(dictionary: Dictionary, blocks: Iterable[np.ndarray], mesh: Mesh, batch: int = 4096) -> Reconstruction:
    """Scores a dictionary in one pass over activations.

    Args:
      dictionary: what to score.
      blocks: activations [n, d], any n, attention sinks left out.
      mesh: tokens are split over ``data``.
      batch: tokens per program; the last batch is filled up with rows that do not count.

    Raises:
      UserError: there are no activations.
    """
    graph, state = nnx.split(dictionary)
    state = jax.device_put(state, sharding(mesh))
    features = dictionary.config.n_features
    tokens, error, square = 0, 0.0, 0.0
    total_D = np.zeros(dictionary.config.d_in)
    fired_F, active_F = np.zeros(features, np.int64), np.zeros(features)
    for x_BxD, count in _batches(blocks, batch):
        placed = jax.device_put(x_BxD, fitting_sharding(mesh, x_BxD.shape, "data", None))
        batch_error_B, batch_fired_F, batch_active_F = jax.device_get(_score(graph, state, placed, count))
        wide_NxD = x_BxD[:count].astype(np.float64)
        tokens += count
        error += batch_error_B.astype(np.float64).sum()
        square += np.square(wide_NxD).sum()
        total_D += wide_NxD.sum(0)
        fired_F += batch_fired_F
        active_F += batch_active_F
    if not tokens:
        raise UserError("there are no held-out activations to score: raise --corpus.held_out or give more text")
    variance = square - np.square(total_D).sum() / tokens
    return Reconstruction(
        tokens=tokens,
        explained_variance=float(1 - error / variance) if variance > 0 else 0.0,
        l0=float(fired_F.sum() / tokens),
        firing_rate_F=fired_F / tokens,
        mean_activation_F=active_F / np.maximum(fired_F, 1),
    )


@functools.partial(jax.jit, static_argnums=0)
def _score(graph, state, x_BxD, count):
    dictionary = nnx.merge(graph, state)
    counts_Bx1 = jnp.arange(x_BxD.shape[0])[:, None] < count
    f_BxF = jnp.where(counts_Bx1, dictionary.encode(x_BxD), 0.0)
    error_BxD = jnp.where(counts_Bx1, x_BxD.astype(f_BxF.dtype) - dictionary.decode(f_BxF), 0.0)
    return jnp.sum(jnp.square(error_BxD), -1), jnp.sum(f_BxF > 0, 0, dtype=jnp.int32), jnp.sum(f_BxF, 0)


def _batches(blocks: Iterable[np.ndarray], batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts blocks into batches of one shape; gives each with the number of rows that count."""
    for block in blocks:
        for start in range(0, len(block), batch):
            rows = block[start : start + batch]
            yield np.pad(rows, ((0, batch - len(rows)), (0, 0))), len(rows)
