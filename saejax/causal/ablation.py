"""Exact effects of removing features: sets x prompts as few, well filled programs.

Removing the set S from a prompt changes the site's value at every position in the dictionary's domain,

    x'_t = x_t - sum_{i in S} (f_{t,i} - g_{t,i}) W_dec_i,

where f is computed once, from the clean x, and g stands in its place (``replacements``; nothing, unless something else
is asked for). The part of x that the dictionary does not explain (its error term), attention sinks and padding stay.
One *row* of work is one (set, prompt). What cannot matter is not computed:

- layers below the site, and the prompt's tokens before the first at which a feature of the set changes, are those of
  the clean run;
- a row whose set changes nothing on its prompt is not run: its effect is exactly 0;
- of the vocabulary's logits, two are.

Rows are sorted by the number of tokens that are left and run in batches of few different shapes.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.causal.cut import Cut
from saejax.causal.replacements import Replacement
from saejax.causal.rows import RowBatch, batches_of, tokens_needed
from saejax.causal.split import CleanRun, SplitModel, active_features, of_features
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.incremental import Past
from saejax.parallel import fitting_sharding, sharding

_IN_FLIGHT = 2  # batches that the device works on while the host waits for an earlier one
ZERO = Replacement()
FEATURES = 1024  # most features that are gathered at once, unless one set has more


@dataclasses.dataclass(frozen=True)
class LogitDiffs:
    """logit(correct) - logit(wrong) with nothing and with each set of features removed.

    Attributes:
      clean_P: float64, P prompts.
      ablated_SxP: float64, S sets; equal to the clean one, to the last bit, where the set fires nowhere.
      rounding_P: how far the clean logit difference of each prompt, computed from all of its tokens, is from that
        computed from the last one: effects of this size are rounding, and all features share it.
      rows: how many (set, prompt) pairs were run, the clean ones counted once.
      tokens: how many tokens went through the tail, padding included.
    """

    clean_P: np.ndarray
    ablated_SxP: np.ndarray
    rounding_P: np.ndarray
    rows: int
    tokens: int

    @property
    def drop_SxP(self) -> np.ndarray:
        """By how much each set's removal lowers the logit difference."""
        return self.clean_P[None, :] - self.ablated_SxP


def ablate_sets(
    split: SplitModel,
    runs: Sequence[CleanRun],
    sets: Sequence[Sequence[int]],
    batch_rows: int = 64,
    tick: Callable[[int, int], None] = lambda done, total: None,
    plain: bool = False,
    replacement: Replacement = ZERO,
    counterparts: Sequence[CleanRun] = (),
) -> LogitDiffs:
    """Removes each set of features from each prompt.

    Args:
      split: the model, cut at the dictionary's site.
      runs: from ``split.run``.
      sets: feature indices; none twice in a set.
      batch_rows: whole prompts per run of the tail; of rows with few tokens left, as many as have the same tokens.
        Split over the mesh's ``data`` axis where that divides them.
      tick: called at the start and after each batch with the tokens done and of all, padding included; may raise to
        stop.
      plain: run every row on all its tokens, as a check of what is left out otherwise.
      replacement: what stands in the features' place.
      counterparts: for the replacement ``counterpart``, from ``split.run_counterparts``.

    Raises:
      UserError: a logit difference is not finite.
    """
    if any(len(set(s)) != len(s) for s in sets):
        raise ValueError("a feature is twice in one set")
    all_sets = [np.asarray(s, np.int64) for s in [*sets, (), ()]]  # the clean run, from all tokens and from the last
    diff_SxP = np.full((len(all_sets), sum(len(run.index_P) for run in runs)), np.nan)
    sources = [Source(run, other, replacement) for run, other in zip(runs, counterparts or runs, strict=True)]
    work = [_work(split, source, all_sets, batch_rows, plain) for source in sources]
    total = sum(batch.tokens for batches in work for batch in batches)
    tick(0, total)
    rows = done = 0
    for batch, index_P, device_diff_R in lagging(_dispatched(split, sources, work, all_sets)):
        diff_R = np.asarray(device_diff_R, np.float64)[: len(batch.set_N)]
        if not np.isfinite(diff_R).all():
            raise UserError(
                f"a logit difference after an edit at {split.cut.site} is not finite: the model or the dictionary "
                "holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
            )
        diff_SxP[batch.set_N, index_P[batch.place_N]] = diff_R
        rows, done = rows + int((batch.set_N != len(sets)).sum()), done + batch.tokens
        tick(done, total)
    clean_P = diff_SxP[-1]
    ablated_SxP = np.where(np.isnan(diff_SxP[:-2]), clean_P[None, :], diff_SxP[:-2])
    return LogitDiffs(clean_P, ablated_SxP, np.abs(diff_SxP[-2] - clean_P), rows, done)


class Source(NamedTuple):
    """Prompts without an edit, their counterparts (or once more themselves), and what stands in place of features."""

    run: CleanRun
    other: CleanRun
    replacement: Replacement

    @property
    def arrays(self) -> tuple[Replacement, list[jax.Array]]:
        """What the programs take: the replacement; values and domains of the prompts and, if read, the counterparts."""
        values = [array for run in (self.run, self.other) for array in (run.value_BxTxD, run.domain_BxT)]
        return self.replacement, values if self.replacement.kind == "counterpart" else values[:2]


def _work(
    split: SplitModel, source: Source, sets: Sequence[np.ndarray], batch_rows: int, plain: bool
) -> list[RowBatch]:
    """The batches of rows to run on the prompts of one clean run."""
    run = source.run
    prompts, length = len(run.index_P), run.domain_BxT.shape[1]
    if plain:
        needed_SxP = np.full((len(sets), prompts), length)
    else:
        first_BxF = np.asarray(first_change(split.cut, split.graph, split.state, *source.arrays))
        needed_SxP = tokens_needed(first_BxF[:prompts], run.last_B[:prompts], sets)
        needed_SxP[-2], needed_SxP[-1] = run.last_B[:prompts] + 1, 1
    return batches_of(needed_SxP, sets, length, batch_rows, FEATURES)


class Bank(NamedTuple):
    """What the rows on a clean run's prompts are built from: K features."""

    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    removed_BxTxK: jax.Array
    W_dec_KxD: jax.Array
    past: Past


def _dispatched(
    split: SplitModel, sources: Sequence[Source], work: Sequence[Sequence[RowBatch]], sets: Sequence[np.ndarray]
) -> Iterator[tuple[RowBatch, np.ndarray, jax.Array]]:
    """Starts the tail on all rows; yields each batch with its prompts' places and its rows' logit differences."""
    for source, batches in zip(sources, work, strict=True):
        run = source.run
        past, bank, features_K = split.past(run), None, None
        for batch in batches:
            if features_K is not batch.features_K:
                features_K = batch.features_K
                removed_BxTxK, W_dec_KxD = gather(
                    split.cut, split.graph, split.state, *source.arrays, features_K, len(run.index_P)
                )
                bank = Bank(run.stream_BxTxD, run.value_BxTxD, removed_BxTxK, W_dec_KxD, past)
            place_R, members_RxK = batch.filled(sets)
            last_R = run.last_B[place_R]
            first_R = np.maximum(last_R - batch.length + 1, 0).astype(np.int32)
            rows = split.by_row(place_R, first_R, members_RxK, last_R, run.answers_Bx2[place_R])
            yield batch, run.index_P, run_rows(split.cut, batch.length, split.params, bank, *rows)


def lagging(items: Iterable) -> Iterator:
    """Runs ``_IN_FLIGHT`` items ahead of its reader."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > _IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


@functools.partial(jax.jit, static_argnums=(0, 1))
def first_change(
    cut: Cut, graph: nnx.GraphDef, state: nnx.State, replacement: Replacement, arrays: Sequence[jax.Array]
) -> jax.Array:
    """The first position at which removing each feature changes anything, int32 [B, F]; T where it changes nothing.

    Args:
      arrays: values [B, T, D] and domains [B, T] of the prompts and, for ``counterpart``, of their counterparts.
    """
    length = arrays[1].shape[1]
    position_T = jnp.arange(length, dtype=jnp.int32)

    def first(f_PxTxF: jax.Array, domain_PxT: jax.Array, *others: jax.Array) -> jax.Array:
        other_PxTxF = active_features(graph, state, *others) if others else f_PxTxF
        changes_PxTxF = replacement.changes(f_PxTxF, other_PxTxF, domain_PxT)
        return jnp.min(jnp.where(changes_PxTxF, position_T[None, :, None], jnp.int32(length)), axis=1)

    first_BxF = of_features(graph, state, [*arrays[:2], *arrays[1:]], first)
    return jax.lax.with_sharding_constraint(first_BxF, sharding(cut.mesh))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gather(
    cut: Cut,
    graph: nnx.GraphDef,
    state: nnx.State,
    replacement: Replacement,
    arrays: Sequence[jax.Array],
    features_K: jax.Array,
    prompts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """By how much the features' activations fall [B, T, K], and their directions [K, D].

    Args:
      arrays: as for ``first_change``.
      prompts: how many of the B rows are prompts.
    """

    def chosen(f_PxTxF: jax.Array) -> jax.Array:
        return f_PxTxF[:, :, features_K]

    f_BxTxK = of_features(graph, state, arrays[:2], chosen)
    other_BxTxK = of_features(graph, state, arrays[2:], chosen) if arrays[2:] else f_BxTxK
    removed_BxTxK = replacement.removed(f_BxTxK, other_BxTxK, arrays[1], features_K, prompts)
    W_dec_KxD = nnx.merge(graph, state).W_dec_FxD[...][features_K]
    return jax.lax.with_sharding_constraint((removed_BxTxK, W_dec_KxD), sharding(cut.mesh))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_rows(
    cut: Cut,
    length: int,
    params: decoder.Params,
    bank: Bank,
    place_R: jax.Array,
    first_R: jax.Array,
    members_RxK: jax.Array,
    last_R: jax.Array,
    answers_Rx2: jax.Array,
) -> jax.Array:
    """The rows' logit differences [R], from ``length`` tokens of each, those from position ``first_R`` on."""
    row_Rx1, token_RxT = place_R[:, None], first_R[:, None] + jnp.arange(length)[None, :]
    stream_RxTxD, value_RxTxD, removed_RxTxK = (array[row_Rx1, token_RxT] for array in bank[:3])
    removed_RxTxK = jnp.where(members_RxK[:, None, :], removed_RxTxK, jnp.zeros_like(removed_RxTxK))
    removed_RxTxD = matmul(removed_RxTxK, bank.W_dec_KxD)
    edited_RxTxD = (value_RxTxD.astype(removed_RxTxD.dtype) - removed_RxTxD).astype(value_RxTxD.dtype)
    by_row = fitting_sharding(cut.mesh, edited_RxTxD.shape, "data", None, None)
    stream_RxTxD, edited_RxTxD = jax.lax.with_sharding_constraint((stream_RxTxD, edited_RxTxD), by_row)
    diff_R = cut.tail_after(
        params, bank.past, place_R, first_R, stream_RxTxD, edited_RxTxD, last_R - first_R, answers_Rx2
    )
    return jax.lax.with_sharding_constraint(diff_R, sharding(cut.mesh))
