"""Features of a dictionary matched to the directions of the world, and scores on held-out vectors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.losses import explained_share
from saejax.dictionaries.matmul import matmul
from saejax.ground_truth.settings import TruthConfig
from saejax.ground_truth.world import HELD_OUT, World, batch_key, sample
from saejax.results import Interval

RECOVERED = 0.9  # absolute cosine above which a direction counts as recovered
FREQUENT = 1e-4  # a direction that is active in a larger share of the vectors must be found
SHARE_RANGE = (0.0, 1.0)  # of shares and absolute cosines
_BATCH = 1024
_MIN_CHILD = 20  # activations of a child before it can count as absorbing its parent
_CARRIES = 0.25  # absolute cosine above which a child's feature carries the parent's direction, too
_MOSTLY = 0.5**0.5  # absolute cosine above which most of a feature's squared length lies along a direction
_CLOSE = 0.5  # absolute cosine with each of two directions above which a feature stands for both


@dataclasses.dataclass(frozen=True)
class Matching:
    """Features of a dictionary and directions of the world, compared by absolute cosine."""

    cosine_FxJ: np.ndarray  #: absolute cosines of decoder rows and directions
    #: feature assigned to each direction, one to one, with the largest sum of cosines (Hungarian method); -1 where
    #: there are fewer features than directions.
    feature_J: np.ndarray
    matched_J: np.ndarray  #: their cosines; 0 where there is none
    nearest_F: np.ndarray  #: nearest direction of each feature

    @classmethod
    def of(cls, W_dec_FxD: np.ndarray, directions_JxD: np.ndarray) -> "Matching":
        """Match the decoder rows ``W_dec_FxD`` to directions, both of any length."""
        from scipy.optimize import linear_sum_assignment

        cosine_FxJ = np.abs(_unit(W_dec_FxD) @ _unit(directions_JxD).T)
        # One to one: a feature that is near many directions recovers only one of them.
        rows, columns = linear_sum_assignment(cosine_FxJ, maximize=True)
        feature_J = np.full(len(directions_JxD), -1)
        feature_J[columns] = rows
        matched_J = np.where(feature_J < 0, 0.0, cosine_FxJ[feature_J, np.arange(len(feature_J))])
        return cls(cosine_FxJ, feature_J, matched_J, cosine_FxJ.argmax(1))

    @property
    def mcc(self) -> float:
        """Mean cosine of the pairs; there are as many as features or directions, whichever are fewer."""
        return float(self.matched_J[self.feature_J >= 0].mean())

    @property
    def uniqueness(self) -> float:
        """Number of distinct nearest directions, divided by the number of features."""
        return len(np.unique(self.nearest_F)) / len(self.nearest_F)

    @property
    def invented_F(self) -> np.ndarray:
        """True for a feature with most of its squared length along no direction, bool [F]."""
        return self.cosine_FxJ.max(axis=1) <= _MOSTLY

    @property
    def split_J(self) -> np.ndarray:
        """True for a direction along which at least two features have most of their squared length, bool [J]."""
        mostly_F = self.cosine_FxJ[np.arange(len(self.nearest_F)), self.nearest_F] > _MOSTLY
        return np.bincount(self.nearest_F[mostly_F], minlength=self.cosine_FxJ.shape[1]) > 1

    @property
    def merged_J(self) -> np.ndarray:
        """True for a direction whose nearest feature is close to it and also nearest and close to another, bool [J]."""
        nearest_J = self.cosine_FxJ.argmax(0)
        close_J = self.cosine_FxJ[nearest_J, np.arange(len(nearest_J))] > _CLOSE
        count_F = np.bincount(nearest_J[close_J], minlength=len(self.nearest_F))
        return close_J & (count_F[nearest_J] > 1)


def _unit(values_xD: np.ndarray) -> np.ndarray:
    values_xD = np.asarray(values_xD, np.float64)
    return values_xD / np.maximum(np.linalg.norm(values_xD, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over N held-out vectors."""

    tokens: int  #: N
    active_J: np.ndarray  #: number of vectors in which each direction is active
    fired_F: np.ndarray  #: number of vectors on which each feature fires
    nearest_F: np.ndarray  #: vectors on which a feature fires and its nearest direction is active
    matched_J: np.ndarray  #: vectors in which a direction is active and its matched feature fires
    parent_J: np.ndarray  #: vectors in which a direction is active and the feature matched to its parent fires
    #: vectors in which a direction is among the world's largest activations, as many as the dictionary has.
    kept_J: np.ndarray
    error: float  #: summed squared error of the dictionary's reconstruction
    kept_error: float  #: the same of the kept activations decoded by the true directions
    square: float  #: summed squares of the vectors
    total_D: np.ndarray  #: sum of the vectors

    @property
    def variance(self) -> float:
        """Summed squared distance of the vectors from their mean."""
        return self.square - float(np.square(self.total_D).sum()) / self.tokens


@jax.jit
def _count(
    dictionary: Dictionary,
    world: World,
    x_BxD: jax.Array,
    code_BxJ: jax.Array,
    places: Mapping[str, jax.Array],
    threshold: jax.Array,
) -> dict[str, jax.Array]:
    """Return the sums of one batch; ``places``: nearest directions of features, matched features of directions."""
    f_BxF = dictionary.encode(x_BxD)
    fires_BxF, there_BxJ, kept_BxJ = dictionary.fires(f_BxF), code_BxJ > 0, code_BxJ > threshold
    kept_BxD = matmul(jnp.where(kept_BxJ, code_BxJ, 0.0), world.directions_JxD) + world.bias_D[None]

    def both(features_J: jax.Array) -> jax.Array:
        # -1 would take the last feature: where there is none, nothing fires.
        fires_BxJ = jnp.take(fires_BxF, features_J, axis=1) & (features_J >= 0)[None]
        return jnp.sum(there_BxJ & fires_BxJ, 0)

    return dict(
        active_J=jnp.sum(there_BxJ, 0),
        fired_F=jnp.sum(fires_BxF, 0),
        nearest_F=jnp.sum(fires_BxF & jnp.take(there_BxJ, places["nearest_F"], axis=1), 0),
        matched_J=both(places["matched_J"]),
        parent_J=both(places["parent_J"]),
        kept_J=jnp.sum(kept_BxJ, 0),
        error=jnp.sum((x_BxD - dictionary.decode(f_BxF, x_BxD)) ** 2),
        kept_error=jnp.sum((x_BxD - kept_BxD) ** 2),
        square=jnp.sum(x_BxD**2),
        total_D=jnp.sum(x_BxD, 0),
    )


def count(dictionary: Dictionary, world: World, config: TruthConfig, matching: Matching) -> Counts:
    """Return the sums of a dictionary over the held-out vectors."""
    feature_J, parent_J = matching.feature_J, world.parent_J
    places = dict(
        nearest_F=matching.nearest_F, matched_J=feature_J, parent_J=np.where(parent_J < 0, -1, feature_J[parent_J])
    )
    threshold = _threshold(dictionary, world, config)
    sums: dict[str, Any] = {}
    steps = max(config.held_out // _BATCH, 1)
    for number in range(steps):
        drawn = sample(world, batch_key(config.seed, HELD_OUT, number), _BATCH)
        batch_sums = _count(dictionary, world, *drawn, places, threshold)
        for name, value in batch_sums.items():
            value = np.asarray(value)
            # Counts in int64 and sums in float64: a batch's are fp32, and there are thousands of batches.
            wide = value.astype(np.int64 if value.dtype.kind == "i" else np.float64)
            sums[name] = sums.get(name, 0) + wide
    scalars: dict[str, Any] = {name: float(sums.pop(name)) for name in ("error", "kept_error", "square")}
    return Counts(tokens=steps * _BATCH, **sums, **scalars)


def _threshold(dictionary: Dictionary, world: World, config: TruthConfig) -> np.float32:
    """Return the activation above which the world has as many as the dictionary, on one batch; 0 if it has fewer."""
    x_BxD, code_BxJ = sample(world, batch_key(config.seed, HELD_OUT, 0), _BATCH)
    kept = int(jnp.sum(dictionary.fires(dictionary.encode(x_BxD))))
    size_N = np.sort(np.asarray(code_BxJ)[np.asarray(code_BxJ) > 0])
    # The next smaller one, as the threshold itself is not above itself.
    return np.float32(size_N[-kept - 1] if kept < len(size_N) else 0.0)


def scores(counts: Counts, matching: Matching, world: World) -> dict[str, float]:
    """Return the scores of ``results.FoundFeatures`` by their names."""
    # By what was drawn, not by the settings: parents and siblings make features rarer than intended.
    often_J = counts.active_J > FREQUENT * counts.tokens
    fired_J = np.where(matching.feature_J < 0, 0, counts.fired_F[matching.feature_J])

    def share(where_J: np.ndarray) -> float:
        return float(where_J[often_J].mean()) if often_J.any() else 0.0

    return dict(
        recovered=share(matching.matched_J > RECOVERED),
        mcc=matching.mcc,
        f1=share(_f1(counts.matched_J, fired_J, counts.active_J)),
        f1_features=float(_f1(counts.nearest_F, counts.fired_F, counts.active_J[matching.nearest_F]).mean()),
        uniqueness=matching.uniqueness,
        split=share(matching.split_J),
        merged=share(matching.merged_J),
        absorbed=share(absorbed(counts, matching, world)),
        l0=float(counts.fired_F.sum() / counts.tokens),
        dead=float(np.mean(counts.fired_F == 0)),
        explained_variance=float(explained_share(counts.error, counts.variance, counts.square)),
        best_f1=share(_f1(counts.kept_J, counts.kept_J, counts.active_J)),
        best_explained_variance=float(explained_share(counts.kept_error, counts.variance, counts.square)),
        # Dead features keep directions of the initialisation, which no training has invented.
        invented=float(matching.invented_F[counts.fired_F > 0].mean()) if counts.fired_F.any() else 0.0,
    )


def _f1(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 2 both / (first + second), the harmonic mean of precision and recall; 0 where both are 0."""
    return 2 * both / np.maximum(first + second, 1)


def absorbed(counts: Counts, matching: Matching, world: World) -> np.ndarray:
    """Return where a child's feature absorbs the feature of its parent, bool [J].

    The parent's feature fires on most vectors with the parent but without that child, less than half as often with it,
    and the child's feature carries the parent's direction as well.
    """
    found_J = np.zeros(len(world.parent_J), bool)
    # Of few activations a rate says nothing.
    child_N = np.flatnonzero((world.parent_J >= 0) & (counts.active_J >= _MIN_CHILD) & (matching.feature_J >= 0))
    parent_N = world.parent_J[child_N]
    with_N = counts.parent_J[child_N] / counts.active_J[child_N]
    rest_N = counts.active_J[parent_N] - counts.active_J[child_N]
    without_N = (counts.matched_J[parent_N] - counts.parent_J[child_N]) / np.maximum(rest_N, 1)
    carries_N = matching.cosine_FxJ[matching.feature_J[child_N], parent_N] > _CARRIES
    found_J[parent_N[(rest_N > 0) & (without_N > 0.5) & (with_N < without_N / 2) & carries_N]] = True
    return found_J


def over_seeds(values: Sequence[float], ends: tuple[float, float] = SHARE_RANGE) -> Interval:
    """Return the mean and its 95 % t interval, clipped to the range of values; one value has an interval of length 0.

    Args:
      values: values of seeds or prompts.
      ends: smallest and largest possible value.
    """
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else 0.0
    return Interval(mean, max(mean - half, ends[0]), min(mean + half, ends[1]))
