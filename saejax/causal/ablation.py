"""Exact effects of removing features: sets x prompts as few, well filled programs.

Removing the set S from a prompt changes the site's value at every position in the dictionary's domain,

    x'_t = x_t - sum_{i in S} (f_{t,i} - g_{t,i}) W_dec_i,

where f is computed once, from the clean x, and g stands in its place (``replacements``; nothing, unless something else
is asked for). The part of x that the dictionary does not explain (its error term), attention sinks and padding stay.
One *row* of work is one (set, prompt). What cannot matter is not computed:

- layers below the site, and the prompt's tokens before the first at which a feature of the set changes, are those of
  the clean run;
- a row whose set changes nothing on its prompt is not run: its effect is exactly 0;
- prompts that begin alike, and are changed alike there, share those tokens (``rows``);
- of the vocabulary's logits, two are, unless more readouts are asked for.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.causal.chunks import Chunks
from saejax.causal.cut import Cut
from saejax.causal.replacements import Replacement
from saejax.causal.rows import Prompts, RowBatch, all_different, batches_of, first_changes
from saejax.causal.split import CleanRun, SplitModel, active_features, of_features
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.incremental import Past, Tree
from saejax.parallel import fitting_sharding, sharding
from saejax.settings import READOUTS

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
      tokens: how many tokens went through the tail, those that fill up batches included.
      readouts: of further readouts, by name, the values without an edit [P] and of each set [S, P]: those of
        ``settings.READOUTS`` if they were asked for.
    """

    clean_P: np.ndarray
    ablated_SxP: np.ndarray
    rounding_P: np.ndarray
    rows: int
    tokens: int
    readouts: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

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
    readouts: bool = False,
    folder: Path | None = None,
) -> LogitDiffs:
    """Removes each set of features from each prompt.

    Args:
      split: the model, cut at the dictionary's site.
      runs: from ``split.run``.
      sets: feature indices; none twice in a set.
      batch_rows: a batch of the tail has the tokens of so many whole prompts. Its shards, one for each place on the
        mesh's ``data`` axis, run side by side.
      tick: called at the start and after each batch with the tokens done and of all, padding included, of those that
        are to be run; may raise to stop.
      plain: run every row on all its tokens, sharing none, as a check of what is left out otherwise.
      replacement: what stands in the features' place.
      counterparts: for the replacement ``counterpart``, from ``split.run_counterparts``.
      readouts: whether all readouts are wanted: they take the logits of the whole vocabulary.
      folder: where batches that are done are kept, so that the same call, when it was killed, goes on there; see
        ``chunks.Chunks``. None: nowhere.

    Raises:
      UserError: a readout is not finite.
    """
    if any(len(set(s)) != len(s) for s in sets):
        raise ValueError("a feature is twice in one set")
    all_sets = [np.asarray(s, np.int64) for s in [*sets, (), ()]]  # the clean run, from all tokens and from the last
    sources = [Source(run, other, replacement) for run, other in zip(runs, counterparts or runs, strict=True)]
    work = [Work.plan(split, source, all_sets, batch_rows, plain) for source in sources]
    batches = [(part.source.run.index_P, batch) for part in work for batch in part.batches]
    names = ("logit_diff", *READOUTS) if readouts else ("logit_diff",)
    shapes = [(len(batch.shards), batch.size, len(names)) for _, batch in batches]
    chunks = Chunks(folder, shapes, _plan(work, all_sets))
    _measure(split, work, all_sets, readouts, chunks, tick)
    found_MxSxP = np.full((len(names), len(all_sets), sum(len(run.index_P) for run in runs)), np.nan)
    for (index_P, batch), values_SxRxM in zip(batches, chunks.values, strict=True):
        for shard, values_RxM in zip(batch.shards, values_SxRxM, strict=True):
            found_MxSxP[:, shard.set_N, index_P[shard.place_N]] = values_RxM[: len(shard.set_N)].T
    rows = sum(int((shard.set_N != len(sets)).sum()) for _, batch in batches for shard in batch.shards)
    tokens = sum(batch.tokens * len(batch.shards) for _, batch in batches)
    clean_MxP, whole_P = found_MxSxP[:, -1], found_MxSxP[0, -2]
    if readouts:
        clean_MxP[names.index("kl")] = 0.0
    ablated_MxSxP = np.where(np.isnan(found_MxSxP[:, :-2]), clean_MxP[:, None, :], found_MxSxP[:, :-2])
    more = {name: (clean_MxP[m], ablated_MxSxP[m]) for m, name in enumerate(names) if m}
    return LogitDiffs(clean_MxP[0], ablated_MxSxP[0], np.abs(whole_P - clean_MxP[0]), rows, tokens, more)


class Source(NamedTuple):
    """Prompts without an edit, their counterparts (or once more themselves), and what stands in place of features."""

    run: CleanRun
    other: CleanRun
    replacement: Replacement

    @property
    def arrays(self) -> tuple[Replacement, list[jax.Array]]:
        """What the programs take: the replacement; of the prompts and, if they count, of the counterparts what is read
        and the domain."""
        arrays = [array for run in (self.run, self.other) for array in (run.read_BxTxD, run.domain_BxT)]
        return self.replacement, arrays if self.replacement.kind == "counterpart" else arrays[:2]

    def alike(self) -> np.ndarray:
        """``prefix_PxT`` as far as what is changed in the prompts is the same."""
        prefix_PxT, other_PxT = self.run.prefix_PxT, self.other.prefix_PxT
        if self.replacement.kind == "random":  # draws differ from prompt to prompt
            return all_different(prefix_PxT)
        both = self.replacement.kind == "counterpart"
        return prefix_PxT * (int(other_PxT.max(initial=0)) + 1) + other_PxT if both else prefix_PxT


class Work(NamedTuple):
    """What is to be run on the prompts of one clean run."""

    source: Source
    prompts: Prompts
    batches: list[RowBatch]

    @classmethod
    def plan(
        cls, split: SplitModel, source: Source, sets: Sequence[np.ndarray], batch_rows: int, plain: bool
    ) -> "Work":
        """The last two sets, which are empty, are run on all tokens and on the last one."""
        run, (count, length) = source.run, source.run.prefix_PxT.shape
        alike_PxT = all_different(run.prefix_PxT) if plain else source.alike()
        prompts = Prompts(run.last_B[:count], alike_PxT)
        if plain:
            first_SxP = np.zeros((len(sets), count), np.int64)
        else:
            first_BxF = np.asarray(first_change(split.cut, split.graph, split.state, *source.arrays))
            first_SxP = first_changes(first_BxF[:count], sets)
            first_SxP[-2], first_SxP[-1] = 0, prompts.last_P
        shards = split.cut.mesh.shape["data"]
        return cls(source, prompts, batches_of(first_SxP, prompts, sets, batch_rows * length, FEATURES, shards))


class Bank(NamedTuple):
    """What the rows on a clean run's prompts are built from: K features."""

    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    removed_BxTxK: jax.Array
    W_dec_KxD: jax.Array
    past: Past
    logp_BxV: jax.Array | None


def _plan(work: Sequence[Work], sets: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """What decides each batch's values, beside the model, the dictionary, the prompts and the replacement."""
    yield from sets
    for part in work:
        for batch in part.batches:
            yield np.array([batch.size, batch.length, batch.tokens])
            for shard in batch.shards:
                yield from (shard.set_N, shard.place_N, shard.first_N)


def _measure(
    split: SplitModel,
    work: Sequence[Work],
    sets: Sequence[np.ndarray],
    readouts: bool,
    chunks: Chunks,
    tick: Callable[[int, int], None],
) -> None:
    """Runs the batches that ``chunks`` lacks."""
    before = len(chunks.values)
    left = [batch for part in work for batch in part.batches][before:]
    done, total = 0, sum(batch.tokens * len(batch.shards) for batch in left)
    tick(0, total)
    with chunks:
        for batch, device_SxRxM in zip(left, lagging(_dispatched(split, work, sets, readouts, before)), strict=True):
            values_SxRxM = np.asarray(device_SxRxM)
            real_SxR = np.arange(batch.size)[None, :] < np.array([[len(shard.set_N)] for shard in batch.shards])
            if not np.isfinite(values_SxRxM[real_SxR]).all():
                raise UserError(
                    f"a logit difference after an edit at {split.cut.site} is not finite: the model or the dictionary "
                    "holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
                )
            chunks.add(values_SxRxM)
            done += batch.tokens * len(batch.shards)
            tick(done, total)


def _dispatched(
    split: SplitModel, work: Sequence[Work], sets: Sequence[np.ndarray], readouts: bool, before: int
) -> Iterator[jax.Array]:
    """Starts the tail on the rows of all batches but the first so many; yields each one's readouts."""
    for source, prompts, batches in work:
        left, before = batches[before:], max(before - len(batches), 0)
        if not left:
            continue
        run = source.run
        end_BxD, past = split.past(run)
        logp_BxV = clean_logp(split.cut, split.params, end_BxD) if readouts else None
        bank, features_K = None, None
        for batch in left:
            if features_K is not batch.features_K:
                features_K = batch.features_K
                removed_BxTxK, W_dec_KxD = gather(
                    split.cut, split.graph, split.state, *source.arrays, features_K, len(run.index_P)
                )
                bank = Bank(run.stream_BxTxD, run.value_BxTxD, removed_BxTxK, W_dec_KxD, past, logp_BxV)
            tree, rows = batch.filled(prompts, sets)
            placed = Tree(*split.by_row(*tree))
            others = split.by_row(*rows, run.answers_Bx2[tree.place_SxR])
            yield run_rows(split.cut, split.params, bank, placed, *others)


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
      arrays: what is read [B, T, D] and domains [B, T] of the prompts and, for ``counterpart``, of their counterparts.
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


@functools.partial(jax.jit, static_argnums=0)
def clean_logp(cut: Cut, params: decoder.Params, end_BxD: jax.Array) -> jax.Array:
    """Log-probabilities of the next token after prompts without an edit, fp32 [B, V]."""
    logp_BxV = jax.nn.log_softmax(decoder.unembed(cut.config, params, end_BxD))
    return jax.lax.with_sharding_constraint(logp_BxV, sharding(cut.mesh))


@functools.partial(jax.jit, static_argnums=0)
def run_rows(
    cut: Cut,
    params: decoder.Params,
    bank: Bank,
    tree: Tree,
    end_SxR: jax.Array,
    members_SxRxK: jax.Array,
    answers_SxRx2: jax.Array,
) -> jax.Array:
    """The rows' readouts [S, R, M]: the logit difference, and if the bank has clean probabilities all others.

    Args:
      end_SxR: which of its shard's tokens is each row's last.
      members_SxRxK: the features that each row removes.
      answers_SxRx2: token ids of the correct and the wrong answer.
    """
    stream_SxNxD, value_SxNxD, removed_SxNxK = (array[tree.place_SxN, tree.position_SxN] for array in bank[:3])
    removed_SxNxK = jnp.where(tree.of_tokens(members_SxRxK), removed_SxNxK, jnp.zeros_like(removed_SxNxK))
    removed_SxNxD = matmul(removed_SxNxK, bank.W_dec_KxD)
    edited_SxNxD = (value_SxNxD.astype(removed_SxNxD.dtype) - removed_SxNxD).astype(value_SxNxD.dtype)
    by_shard = fitting_sharding(cut.mesh, edited_SxNxD.shape, "data", None, None)
    stream_SxNxD, edited_SxNxD = jax.lax.with_sharding_constraint((stream_SxNxD, edited_SxNxD), by_shard)
    x_SxNxD = cut.tail_of_tree(params, bank.past, tree, stream_SxNxD, edited_SxNxD)
    x_RxD = jnp.take_along_axis(x_SxNxD, end_SxR[..., None], axis=1).reshape(-1, x_SxNxD.shape[-1])
    logp_RxV = None if bank.logp_BxV is None else bank.logp_BxV[tree.place_SxR.reshape(-1)]
    values_RxM = cut.readouts(params, x_RxD, answers_SxRx2.reshape(-1, 2), logp_RxV)
    return jax.lax.with_sharding_constraint(values_RxM.reshape(*end_SxR.shape, -1), sharding(cut.mesh))
