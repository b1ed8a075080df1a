"""A site's value changed in one direction or by clamped features: on prompts, on held-out text, in generation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.engine import prefetch
from saejax.interventions.split_model import CleanRun, SiteRows, SplitModel
from saejax.models import decoder
from saejax.models.edits import ForwardPass, Positions
from saejax.models.layers import einsum
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.runner.parts import OnProgress, silent

_STEP = 8  # batches are filled up to a multiple of this many rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SteeredTexts:
    """What is changed in each of R texts.

    Attributes:
      added_RxD: added to the value.
      features_RxK: features that are clamped, int32; K may be 0.
      level_RxK: their new activations.
      used_RxK: 1; 0 for what fills up.
    """

    added_RxD: jax.Array | np.ndarray
    features_RxK: jax.Array | np.ndarray
    level_RxK: jax.Array | np.ndarray
    used_RxK: jax.Array | np.ndarray

    @classmethod
    def adding(cls, added_RxD: np.ndarray) -> "SteeredTexts":
        """Vectors added, no feature clamped."""
        none_RxK = np.zeros((len(added_RxD), 0), np.float32)
        return cls(np.asarray(added_RxD, np.float32), none_RxK.astype(np.int32), none_RxK, none_RxK)

    @classmethod
    def clamping(
        cls, features: Sequence[Sequence[int]], levels: Sequence[np.ndarray], width: int, most: int
    ) -> "SteeredTexts":
        """Features of each text, at most ``most``, held at levels; nothing is added to the ``width`` dimensions."""
        features_RxK = np.zeros((len(features), most), np.int32)
        level_RxK, used_RxK = np.zeros((2, *features_RxK.shape), np.float32)
        for row, (own, level_J) in enumerate(zip(features, levels, strict=True)):
            features_RxK[row, : len(own)], level_RxK[row, : len(own)], used_RxK[row, : len(own)] = own, level_J, 1
        return cls(np.zeros((len(features), width), np.float32), features_RxK, level_RxK, used_RxK)

    def __getitem__(self, rows: np.ndarray | Sequence[int]) -> "SteeredTexts":
        return jax.tree.map(lambda array: array[np.asarray(rows)], self)

    def at(self, basis: Dictionary, read_RxTxD: jax.Array) -> jax.Array:
        """By how much the value changes at every position, [R, T, D]."""
        W_dec_FxD = basis.W_dec_FxD[...]
        change_RxTxD = jnp.broadcast_to(self.added_RxD[:, None, :], read_RxTxD.shape).astype(W_dec_FxD.dtype)
        if not self.features_RxK.shape[1]:
            return change_RxTxD
        f_RxTxK = jnp.take_along_axis(basis.encode(read_RxTxD), self.features_RxK[:, None, :], axis=-1)
        moved_RxTxK = (self.level_RxK[:, None, :] - f_RxTxK) * self.used_RxK[:, None, :]
        return change_RxTxD + einsum("rtk,rkd->rtd", moved_RxTxK, W_dec_FxD[self.features_RxK])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SteeringEdit:
    """A change as an edit for ``LanguageModel.generate``; attention sinks are left alone."""

    basis: Dictionary
    change: SteeredTexts
    positions: Positions
    reads: Site = dataclasses.field(metadata=dict(static=True))
    site: Site = dataclasses.field(metadata=dict(static=True))

    def with_sink_norms(self, sink_norm: Callable[[str], float]) -> "SteeringEdit":
        """Return the edit with the sink rule of its dictionary's sites."""
        return dataclasses.replace(self, basis=self.basis.with_sink_norms(sink_norm))

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass) -> jax.Array:
        read_BxTxD = value_BxTxD if self.reads == self.site else run.values[self.reads]
        where_BxT = self.positions.at(run) & self.basis.is_not_sink(read_BxTxD, value_BxTxD)
        return _moved(value_BxTxD, self.change.at(self.basis, read_BxTxD), where_BxT)


class Steered(NamedTuple):
    """S changes on P prompts.

    Attributes:
      diff_SxP: logit(own answer) - logit(target), fp64.
      first_SxP: whether the target is the likeliest of all tokens.
      length_SxP: mean length of the change where it acts; 0 where it acts nowhere.
    """

    diff_SxP: np.ndarray
    first_SxP: np.ndarray
    length_SxP: np.ndarray


def steer_prompts(
    split: SplitModel,
    runs: Sequence[CleanRun],
    changes: Sequence[SteeredTexts],
    batch_rows: int,
    on_progress: OnProgress = silent,
) -> Steered:
    """Runs every prompt with every change.

    Args:
      runs: the prompts, from ``split.run``.
      changes: a row of each for each prompt, in the prompts' order; all with as many clamped features.
      batch_rows: rows of a batch.
      on_progress: called at the start and after each batch with the rows done and of all; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    prompts = sum(len(run.index_P) for run in runs)
    found_3xSxP = np.zeros((3, len(changes), prompts))
    done, total = 0, len(changes) * prompts
    on_progress(0, total)
    for run in runs:
        set_N, place_N = (index.reshape(-1) for index in np.indices((len(changes), len(run.index_P))))
        size = rows_at_once(batch_rows, len(set_N))
        batches = [slice(first, first + size) for first in range(0, len(set_N), size)]
        filled = ((np.resize(set_N[own], size), np.resize(place_N[own], size)) for own in batches)
        started = (_started(split, run, changes, *rows) for rows in filled)
        for own, device_3xR in zip(batches, prefetch(started), strict=True):
            values_3xC = np.asarray(device_3xR, np.float64)[:, : len(set_N[own])]
            if not np.isfinite(values_3xC).all():
                raise UserError(
                    f"a logit difference with {split.point.site} changed is not finite: the model or the dictionary "
                    "holds NaN or overflows; try --model.dtype=float32, or smaller --steer.doses"
                )
            found_3xSxP[:, set_N[own], run.index_P[place_N[own]]] = values_3xC
            done += values_3xC.shape[1]
            on_progress(done, total)
    return Steered(found_3xSxP[0], found_3xSxP[1] > 0, found_3xSxP[2])


def rows_at_once(batch_rows: int, count: int) -> int:
    """Rows of a batch: ``batch_rows``, or all ``count``, filled up, where there are fewer."""
    return min(batch_rows, -(-count // _STEP) * _STEP)


def _started(
    split: SplitModel, run: CleanRun, changes: Sequence[SteeredTexts], set_R: np.ndarray, place_R: np.ndarray
) -> jax.Array:
    rows = [changes[number][[run.index_P[place]]] for number, place in zip(set_R, place_R, strict=True)]
    change = jax.tree.map(lambda *parts: split.by_row(np.concatenate(parts))[0], *rows)
    (placed_R,) = split.by_row(place_R.astype(np.int32))
    return steer_rows(split.point, split.params, split.dictionary, run.rows(slice(None)), placed_R, change)


@functools.partial(jax.jit, static_argnums=0)
def steer_rows(
    point: SplitPoint,
    params: decoder.Params,
    basis: Dictionary,
    clean: SiteRows,
    place_R: jax.Array,
    change: SteeredTexts,
) -> jax.Array:
    """The program of ``steer_prompts``: logit difference, whether the target is first, length of the change, [3, R].

    Args:
      clean: the rows of a clean run.
      place_R: the prompt of each row.
    """
    rows = (jnp.asarray(array)[place_R] for array in clean)
    stream_RxTxD, value_RxTxD, read_RxTxD, domain_RxT, last_R, answers_Rx2 = rows
    change_RxTxD = change.at(basis, read_RxTxD)
    x_RxTxD = point.run_suffix(params, stream_RxTxD, _moved(value_RxTxD, change_RxTxD, domain_RxT))
    last_RxD = jnp.take_along_axis(x_RxTxD, last_R[:, None, None], axis=1)[:, 0]
    logits_RxV = decoder.unembed(point.config, params, last_RxD, point.rules)
    own_R, target_R = jnp.take_along_axis(logits_RxV, answers_Rx2, axis=1).T
    first_R = logits_RxV.argmax(axis=1) == answers_Rx2[:, 1]
    length_RxT = jnp.where(domain_RxT, jnp.linalg.norm(change_RxTxD, axis=-1), 0.0)
    length_R = length_RxT.sum(axis=1) / jnp.maximum(domain_RxT.sum(axis=1), 1)
    found = jnp.stack([own_R - target_R, first_R.astype(own_R.dtype), length_R.astype(own_R.dtype)])
    return jax.lax.with_sharding_constraint(found, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def steered_value(
    point: SplitPoint,
    basis: Dictionary,
    value_BxTxD: jax.Array,
    read_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    change: SteeredTexts,
) -> jax.Array:
    """The site's value [B, T, D] of some texts, changed in the domain [B, T]; the basis is given ``read`` [B, T, D]."""
    moved_BxTxD = _moved(value_BxTxD, change.at(basis, read_BxTxD), domain_BxT)
    return jax.lax.with_sharding_constraint(moved_BxTxD, sharding(point.mesh))


def _moved(value_BxTxD: jax.Array, change_BxTxD: jax.Array, where_BxT: jax.Array) -> jax.Array:
    moved_BxTxD = (value_BxTxD.astype(change_BxTxD.dtype) + change_BxTxD).astype(value_BxTxD.dtype)
    return jnp.where(where_BxT[..., None], moved_BxTxD, value_BxTxD)
