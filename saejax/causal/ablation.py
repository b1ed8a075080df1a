"""Exact effects of removing features: sets x prompts as one batched program.

Removing the set S from a prompt changes the site's value at every position in the dictionary's domain,

    x'_t = x_t - sum_{i in S} f_{t,i} W_dec_i,

where f is computed once, from the clean x; the part of x that the dictionary does not explain (its error
term), attention sinks and padding stay. One *row* of work is one (set, prompt). The rows' edited values are built on
the device from the few features in question, and only the tail of the model runs. A row whose set fires nowhere
on its prompt is not run: its effect is exactly 0.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.causal.controls import FeatureStatistics
from saejax.causal.split import Cut, PromptBatch, SplitModel, active_features
from saejax.errors import UserError
from saejax.models import decoder
from saejax.parallel import fitting_sharding, sharding

_IN_FLIGHT = 2  # batches that the device works on while the host waits for an earlier one


@dataclasses.dataclass(frozen=True)
class LogitDiffs:
    """logit(correct) - logit(wrong) with nothing and with each set of features removed.

    Attributes:
      clean_P: float64, P prompts.
      ablated_SxP: float64, S sets; equal to the clean one, to the last bit, where the set fires nowhere.
      rows: how many (set, prompt) pairs were run.
    """

    clean_P: np.ndarray
    ablated_SxP: np.ndarray
    rows: int

    @property
    def drop_SxP(self) -> np.ndarray:
        """By how much each set's removal lowers the logit difference."""
        return self.clean_P[None, :] - self.ablated_SxP


def statistics(split: SplitModel, batches: Sequence[PromptBatch]) -> FeatureStatistics:
    """How often and how strongly every feature fires on the prompts, at the positions that an ablation changes.

    Raises:
      UserError: a feature's activation is not finite.
    """
    parts = []
    for batch in batches:
        kept_B = np.arange(len(batch.last_B)) < len(batch.index_P)  # not the copies that fill up the batch
        parts.append(_count(split.cut, split.graph, split.state, batch.value_BxTxD, batch.domain_BxT, kept_B))
    total = FeatureStatistics.total((int(n), np.asarray(fires_F), np.asarray(sum_F)) for n, fires_F, sum_F in parts)
    if not np.isfinite(total.sum_F).all():
        raise UserError(
            f"feature {int(np.argmin(np.isfinite(total.sum_F)))} has an activation that is not finite: the dictionary "
            "holds NaN or overflows; train it again"
        )
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(
    cut: Cut, graph: nnx.GraphDef, state: nnx.State, value_BxTxD: jax.Array, domain_BxT: jax.Array, kept_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    domain_BxT = domain_BxT & kept_B[:, None]
    f_BxTxF = active_features(graph, state, value_BxTxD, domain_BxT)
    fires_BxTxF = nnx.merge(graph, state).fires(f_BxTxF)
    size_BxTxF = jnp.where(fires_BxTxF, jnp.abs(f_BxTxF), 0.0 * f_BxTxF)  # 0, or NaN where it is NaN
    counts = domain_BxT.sum(), fires_BxTxF.sum(axis=(0, 1)), size_BxTxF.sum(axis=(0, 1))
    return jax.lax.with_sharding_constraint(counts, sharding(cut.mesh))


def ablate_sets(
    split: SplitModel,
    batches: Sequence[PromptBatch],
    sets: Sequence[Sequence[int]],
    batch_rows: int = 64,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> LogitDiffs:
    """Removes each set of features from each prompt.

    Args:
      split: the model, cut at the dictionary's site.
      batches: prompts that ``split.run`` has run.
      sets: feature indices; none twice in a set.
      batch_rows: rows per run of the tail; split over the mesh's ``data`` axis where that divides it.
      tick: called after each batch with the number of rows done and of all rows; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    features_K = np.unique(np.concatenate([np.zeros(0, np.int64), *(np.asarray(s, np.int64) for s in sets)]))
    if any(len(set(s)) != len(s) for s in sets):
        raise ValueError("a feature is twice in one set")
    members_SxK = _members(sets, features_K)
    banks, work = [], []
    for batch in batches:
        f_BxTxK, W_dec_KxD, fires_BxK = make_bank(
            split.cut, split.graph, split.state, batch.value_BxTxD, batch.domain_BxT, features_K
        )
        banks.append(Bank(batch.stream_BxTxD, batch.value_BxTxD, f_BxTxK, W_dec_KxD))
        work.append(_rows_to_run(np.asarray(fires_BxK), batch, members_SxK))
    total = sum(len(rows_Rx2) for rows_Rx2 in work)

    prompts = sum(len(batch.index_P) for batch in batches)
    # The last row of the table is the empty set: the clean run, by the same program.
    diff_SxP = np.full((len(sets) + 1, prompts), np.nan)
    done = 0
    for index_Rx2, device_diff_R in _lagging(_dispatched(split, batches, banks, work, members_SxK, batch_rows)):
        diff_R = np.asarray(device_diff_R, np.float64)[: len(index_Rx2)]
        if not np.isfinite(diff_R).all():
            raise UserError(
                f"a logit difference after an edit at {split.cut.site} is not finite: the model or the dictionary "
                "holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
            )
        diff_SxP[index_Rx2[:, 0], index_Rx2[:, 1]] = diff_R
        done += len(index_Rx2)
        tick(done, total)
    clean_P = diff_SxP[-1]
    ablated_SxP = np.where(np.isnan(diff_SxP[:-1]), clean_P[None, :], diff_SxP[:-1])
    return LogitDiffs(clean_P, ablated_SxP, total)


class Bank(NamedTuple):
    """What the rows of one batch of prompts are built from: K is the number of features in any set."""

    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    f_BxTxK: jax.Array
    W_dec_KxD: jax.Array


def _members(sets: Sequence[Sequence[int]], features_K: np.ndarray) -> np.ndarray:
    """Which of the features are in each set, bool [S + 1, K]; the last set is empty."""
    members_SxK = np.zeros((len(sets) + 1, len(features_K)), bool)
    for members_K, chosen in zip(members_SxK, sets, strict=False):
        members_K[np.searchsorted(features_K, np.asarray(chosen, np.int64))] = True
    return members_SxK


def _rows_to_run(fires_BxK: np.ndarray, batch: PromptBatch, members_SxK: np.ndarray) -> np.ndarray:
    """The (set, place in the batch) pairs that are run, [R, 2]: where something fires, and the empty set."""
    runs_SxP = members_SxK.astype(np.float32) @ fires_BxK[: len(batch.index_P)].T.astype(np.float32) > 0
    runs_SxP[-1] = True
    return np.argwhere(runs_SxP)


def _dispatched(
    split: SplitModel,
    batches: Sequence[PromptBatch],
    banks: Sequence[Bank],
    work: Sequence[np.ndarray],
    members_SxK: np.ndarray,
    batch_rows: int,
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Starts the tail on all rows, batch by batch; yields the (set, prompt) pairs [R, 2] and their differences."""
    for batch, bank, rows_Nx2 in zip(batches, banks, work, strict=True):
        for first in range(0, len(rows_Nx2), batch_rows):
            rows_Rx2 = rows_Nx2[first : first + batch_rows]
            # Filled up with the empty set on the first prompt, so that all batches have one shape.
            set_R, place_R = np.zeros((2, batch_rows), np.int32)
            set_R[:], set_R[: len(rows_Rx2)] = len(members_SxK) - 1, rows_Rx2[:, 0]
            place_R[: len(rows_Rx2)] = rows_Rx2[:, 1]
            stream_RxTxD, value_RxTxD = edit_rows(split.cut, bank, *split.by_row(place_R, members_SxK[set_R]))
            diff_R = run_tail(
                split.cut,
                split.params,
                stream_RxTxD,
                value_RxTxD,
                *split.by_row(batch.last_B[place_R], batch.answers_Bx2[place_R]),
            )
            yield np.stack([rows_Rx2[:, 0], batch.index_P[rows_Rx2[:, 1]]], axis=1), diff_R


def _lagging(items: Iterator) -> Iterator:
    """Runs ``_IN_FLIGHT`` items ahead of its reader."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > _IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_bank(
    cut: Cut,
    graph: nnx.GraphDef,
    state: nnx.State,
    value_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    features_K: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The features' activations [B, T, K] and directions [K, D], and where they fire [B, K]."""
    f_BxTxK = active_features(graph, state, value_BxTxD, domain_BxT)[:, :, features_K]
    W_dec_KxD = nnx.merge(graph, state).W_dec_FxD[...][features_K]
    return jax.lax.with_sharding_constraint((f_BxTxK, W_dec_KxD, (f_BxTxK != 0).any(axis=1)), sharding(cut.mesh))


@functools.partial(jax.jit, static_argnums=0)
def edit_rows(cut: Cut, bank: Bank, place_R: jax.Array, members_RxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stream entering the tail and the edited value of the site, each [R, T, D]."""
    f_RxTxK = jnp.where(members_RxK[:, None, :], bank.f_BxTxK[place_R], 0.0)
    removed_RxTxD = jnp.matmul(f_RxTxK, bank.W_dec_KxD, precision="highest")
    stream_RxTxD, value_RxTxD = bank.stream_BxTxD[place_R], bank.value_BxTxD[place_R]
    edited_RxTxD = (value_RxTxD.astype(removed_RxTxD.dtype) - removed_RxTxD).astype(value_RxTxD.dtype)
    by_row = fitting_sharding(cut.mesh, edited_RxTxD.shape, "data", None, None)
    return jax.lax.with_sharding_constraint((stream_RxTxD, edited_RxTxD), by_row)


@functools.partial(jax.jit, static_argnums=0)
def run_tail(
    cut: Cut,
    params: decoder.Params,
    stream_RxTxD: jax.Array,
    value_RxTxD: jax.Array,
    last_R: jax.Array,
    answers_Rx2: jax.Array,
) -> jax.Array:
    """The program of the tail: the rows' logit differences [R]."""
    diff_R = cut.tail(params, stream_RxTxD, value_RxTxD, last_R, answers_Rx2)
    return jax.lax.with_sharding_constraint(diff_R, sharding(cut.mesh))
