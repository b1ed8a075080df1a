"""Benchmark items with an answer to each, run through a model split at a dictionary's site.

The attribution of feature i on an item is activation x gradient, as in ``screening``, of another objective:

    a_i = sum_t f_{t,i} <dL/dx_t, W_dec_i>,    L = sum_r sign_r sum_c log p(answer token c of r | all before it)

over the item's references r: the reference solution, with the sign 1; or, of multiple choice, the right choice with the
sign 1 and the likeliest wrong one with -1. One backward pass per reference; attention sinks and padding count for
nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.activity import fires_and_sizes, total
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.interventions.slopes import weighted
from saejax.interventions.split_model import SplitModel, active_features, run_head
from saejax.models import decoder
from saejax.models.lengths import even_batches
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.tasks.likelihood import align, token_scores

_PROGRAM = 4096  # tokens that run in the time in which programs of another shape are compiled, roughly


@dataclasses.dataclass(frozen=True)
class Reference:
    """An answer to an item.

    Attributes:
      item: the item's place in its list.
      context, answer: token ids, at least one each.
      sign: of its log-likelihood in the item's objective.
    """

    item: int
    context: list[int]
    answer: list[int]
    sign: float = 1.0

    def __len__(self) -> int:
        return len(self.context) + len(self.answer)


class ReferenceBatch(NamedTuple):
    """References after the head; of the B rows some are copies that fill the batch up, which are outside the domain.

    Attributes:
      stream_BxTxD, value_BxTxD, read_BxTxD, domain_BxT: as in ``CleanRun``.
      positions_BxC, targets_BxC: where each answer token is predicted, and which it is; see ``likelihood.align``.
      weight_BxC: the reference's sign at its answer tokens; 0 elsewhere, and in copies.
    """

    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    read_BxTxD: jax.Array
    domain_BxT: jax.Array
    positions_BxC: jax.Array
    targets_BxC: jax.Array
    weight_BxC: jax.Array


class References:
    """References on a model split at a dictionary's site.

    Args:
      references: at least one.
      batch_tokens: tokens per batch, padding included.
      check_stop: called before each batch; may raise to stop.
    """

    def __init__(
        self,
        split: SplitModel,
        references: Sequence[Reference],
        batch_tokens: int,
        check_stop: Callable[[], None] = lambda: None,
    ):
        self._split, self._references = split, references
        self._batch_tokens, self._check_stop = batch_tokens, check_stop
        self._point = of_references(split.point)

    def attribution(self) -> np.ndarray:
        """Each feature's attribution, summed over an item's references, mean over items: fp64 [F], in nats.

        Raises:
          UserError: it is not finite.
        """
        split = self._split
        total_F = np.zeros(split.dictionary.config.n_features)
        for batch in self.batches():
            rows_BxF = attribute(self._point, split.params, split.dictionary, batch)
            total_F = total_F + np.asarray(rows_BxF, np.float64).sum(axis=0)
        if not np.isfinite(total_F).all():
            raise UserError(
                f"the gradient of the log-likelihood with respect to {split.point.site} is not finite: the model or "
                "the dictionary holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
            )
        return total_F / len({reference.item for reference in self._references})

    def statistics(self) -> FeatureStatistics:
        """How often and how strongly every feature fires on prompts and answers.

        Raises:
          UserError: a feature's activation is not finite.
        """
        split = self._split
        counts = (_count(self._point, split.dictionary, batch.read_BxTxD, batch.domain_BxT) for batch in self.batches())
        return total(split, counts)

    def values(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What the dictionary reads [N, D] and what it rebuilds [N, D], batch by batch, sinks left out."""
        for batch in self.batches():
            domain_BxT = np.asarray(batch.domain_BxT)
            read_BxTxD, value_BxTxD = np.asarray(batch.read_BxTxD), np.asarray(batch.value_BxTxD)
            yield read_BxTxD[domain_BxT].astype(np.float32), value_BxTxD[domain_BxT].astype(np.float32)

    def pools(self, features: Sequence[int], most: int, seed: int) -> dict[int, list[float]]:
        """Of each feature activations where it fires: all, or ``most`` drawn without replacement; [] if it never does.

        Args:
          features: distinct.
          most: activations of a feature.
          seed: of the draws, each feature's its own.
        """
        split, features_K = self._split, np.asarray(features, np.int32)
        found: list[list[np.ndarray]] = [[] for _ in features]
        for batch in self.batches() if features else ():
            f_BxTxK = _firing(self._point, split.dictionary, features_K, batch.read_BxTxD, batch.domain_BxT)
            for own, f_BxT in zip(found, np.moveaxis(np.asarray(f_BxTxK), -1, 0), strict=True):
                own.append(f_BxT[f_BxT != 0])
        pools = {}
        for feature, own in zip(features, found, strict=True):
            pool = np.concatenate(own)
            if len(pool) > most:
                pool = np.random.default_rng([seed, feature]).choice(pool, most, replace=False)
            pools[feature] = pool.tolist()
        return pools

    def planned(self) -> list[tuple[np.ndarray, int, int]]:
        """The batches: the places of each one's references, its rows and its length; those of like length together."""
        lengths_N = np.array([len(reference) for reference in self._references])
        return even_batches(lengths_N, self._batch_tokens, self._split.point.mesh.shape["data"], _PROGRAM)

    def batches(self) -> Iterator[ReferenceBatch]:
        """Every batch; see ``batch``."""
        return (self.batch(*planned) for planned in self.planned())

    def batch(self, places_N: np.ndarray, rows: int, length: int) -> ReferenceBatch:
        """A planned batch after the head: of the references at some places, so many rows of one length.

        Raises:
          UserError: the site's value is not finite.
        """
        self._check_stop()
        split, count = self._split, len(places_N)
        filled = [self._references[i] for i in np.resize(places_N, rows)]
        tokens, positions_BxC, targets_BxC = align([(one.context, one.answer) for one in filled], length)
        kept_Bx1 = np.arange(rows)[:, None] < count
        head_rows = split.by_row(tokens.ids_BxT, tokens.last_B, np.broadcast_to(kept_Bx1, tokens.ids_BxT.shape))
        *head, finite_B = run_head(split.point, "keep", split.params, split.dictionary, *head_rows)
        if not np.asarray(finite_B).all():
            raise UserError(
                f"the value of {split.point.site} is not finite on a benchmark's items: the model's weights hold "
                "NaN or it overflows; try --model.dtype=float32 or another model"
            )
        ends_Bx1 = np.array([len(one.answer) for one in filled])[:, None]
        sign_Bx1 = np.array([one.sign for one in filled], np.float32)[:, None]
        weight_BxC = np.where(np.arange(positions_BxC.shape[1])[None, :] < ends_Bx1, sign_Bx1, np.float32(0))
        placed = split.by_row(positions_BxC, targets_BxC, weight_BxC * kept_Bx1)
        return ReferenceBatch(*head, *placed)


def of_references(point: SplitPoint) -> SplitPoint:
    """The point whose gradients keep the least: of long prompts, what they keep of each layer would not fit."""
    return dataclasses.replace(point, rules=dataclasses.replace(point.rules, remat=True))


@functools.partial(jax.jit, static_argnums=0)
def attribute(point: SplitPoint, params: decoder.Params, dictionary: Dictionary, batch: ReferenceBatch) -> jax.Array:
    """The program behind ``References.attribution``: of each row activation x gradient of its weighted answer, [B, F].

    Logits exist only where answer tokens are predicted, a piece of them at a time; see ``likelihood.token_scores``.
    """
    f_BxTxF = active_features(dictionary, batch.read_BxTxD, batch.domain_BxT)
    W_dec_FxD = dictionary.W_dec_FxD[...]

    def objective(value_BxTxD: jax.Array) -> jax.Array:
        # Rows do not see each other, so the gradient of the sum holds every row's own.
        x_BxTxD = point.run_suffix(params, batch.stream_BxTxD, value_BxTxD)
        logp_BxC, _ = token_scores(point.config, params, x_BxTxD, batch.positions_BxC, batch.targets_BxC)
        return (batch.weight_BxC * logp_BxC).sum()

    slope_BxTxD = jax.grad(objective)(batch.value_BxTxD)
    return jax.lax.with_sharding_constraint(weighted(f_BxTxF, slope_BxTxD, W_dec_FxD), sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def _count(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions, and of each feature: at how many it fires, and the sum of its sizes there."""
    f_BxTxF = active_features(dictionary, read_BxTxD, domain_BxT)
    counts = domain_BxT.sum(), *(array.sum(axis=(0, 1)) for array in fires_and_sizes(dictionary, f_BxTxF))
    return jax.lax.with_sharding_constraint(counts, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def _firing(
    point: SplitPoint,
    dictionary: Dictionary,
    features_K: jax.Array,
    read_BxTxD: jax.Array,
    domain_BxT: jax.Array,
) -> jax.Array:
    """Activations [B, T, K] of some features where they fire, 0 elsewhere."""
    f_BxTxK = active_features(dictionary, read_BxTxD, domain_BxT)[..., features_K]
    fires_BxTxK = dictionary.fires(f_BxTxK)
    return jax.lax.with_sharding_constraint(jnp.where(fires_BxTxK, f_BxTxK, 0.0), sharding(point.mesh))
