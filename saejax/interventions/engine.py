"""Exact effects of removing features: sets x prompts as few, well filled programs.

Removing the set S from a prompt changes the site's value at every position in the dictionary's domain,

    x'_t = x_t - sum_{i in S} (f_{t,i} - g_{t,i}) W_dec_i,

where f is computed once, from the clean x, and g stands in its place (``activation_sources``; nothing, unless something
else is asked for). The part of x that the dictionary does not explain (its error term), attention sinks and padding
stay.
One *row* of work is one (set, prompt). What cannot matter is not computed:

- layers below the site, and the prompt's tokens before the first at which a feature of the set changes, are those of
  the clean run;
- a row whose set changes nothing on its prompt is not run: its effect is exactly 0;
- prompts that begin alike, and are changed alike there, share those tokens (``rows``);
- of the vocabulary's logits, two are, unless more readouts are asked for.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from saejax.errors import UserError
from saejax.interventions.engine_programs import CleanValues, clean_logp, first_change, gather, run_rows
from saejax.interventions.replacement import ZERO, ActivationSource
from saejax.interventions.resume import Chunks
from saejax.interventions.rows import Prompts, RowBatch, all_different, batches_of, first_changes
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.models.split import SharedPrefixBatch
from saejax.settings import READOUTS

_IN_FLIGHT = 2  # batches that the device works on while the host waits for an earlier one
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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    plain: bool = False,
    source: ActivationSource = ZERO,
    counterparts: Sequence[CleanRun] = (),
    readouts: bool = False,
    folder: Path | None = None,
) -> LogitDiffs:
    """Removes each set of features from each prompt.

    Args:
      runs: from ``split.run``.
      sets: feature indices; none twice in a set.
      batch_rows: a batch of the tail has the tokens of so many whole prompts. Its shards, one for each place on the
        mesh's ``data`` axis, run side by side.
      on_progress: called at the start and after each batch with the tokens done and of all, padding included, of those
        that are to be run; may raise to stop.
      plain: run every row on all its tokens, sharing none, as a check of what is left out otherwise.
      source: what stands in the features' place.
      counterparts: for the source ``counterpart``, from ``split.run_counterparts``.
      readouts: whether all readouts are wanted: they take the logits of the whole vocabulary.
      folder: where batches that are done are kept, so that the same call, when it was killed, goes on there; see
        ``chunks.Chunks``. None: nowhere.

    Raises:
      UserError: a readout is not finite.
    """
    if any(len(set(s)) != len(s) for s in sets):
        raise ValueError("a feature is twice in one set")
    all_sets = [np.asarray(s, np.int64) for s in [*sets, (), ()]]  # the clean run, from all tokens and from the last
    others = zip(runs, counterparts or runs, strict=True)
    ablated = [AblatedRun(run, other, source.of_run(number)) for number, (run, other) in enumerate(others)]
    plans = [RowPlan.of(split, one, all_sets, batch_rows, plain) for one in ablated]
    batches = [(plan.ablated.run.index_P, batch) for plan in plans for batch in plan.batches]
    names = ("logit_diff", *READOUTS) if readouts else ("logit_diff",)
    shapes = [(len(batch.shards), batch.size, len(names)) for _, batch in batches]
    chunks = Chunks(folder, shapes, _decisive(plans, all_sets))
    _measure(split, plans, all_sets, readouts, chunks, on_progress)
    found_MxExP = np.full((len(names), len(all_sets), sum(len(run.index_P) for run in runs)), np.nan)
    for (index_Q, batch), values_SxRxM in zip(batches, chunks.values, strict=True):
        for shard, values_RxM in zip(batch.shards, values_SxRxM, strict=True):
            found_MxExP[:, shard.set_N, index_Q[shard.place_N]] = values_RxM[: len(shard.set_N)].T
    rows = sum(int((shard.set_N != len(sets)).sum()) for _, batch in batches for shard in batch.shards)
    tokens = sum(batch.tokens * len(batch.shards) for _, batch in batches)
    clean_MxP, whole_P = found_MxExP[:, -1], found_MxExP[0, -2]
    if readouts:
        clean_MxP[names.index("kl")] = 0.0
    ablated_MxSxP = np.where(np.isnan(found_MxExP[:, :-2]), clean_MxP[:, None, :], found_MxExP[:, :-2])
    more = {name: (clean_MxP[m], ablated_MxSxP[m]) for m, name in enumerate(names) if m}
    return LogitDiffs(clean_MxP[0], ablated_MxSxP[0], np.abs(whole_P - clean_MxP[0]), rows, tokens, more)


class AblatedRun(NamedTuple):
    """Prompts without an edit, their counterparts (or once more themselves), and what stands in place of features."""

    run: CleanRun
    other: CleanRun
    source: ActivationSource

    @property
    def arrays(self) -> tuple[ActivationSource, list[jax.Array]]:
        """What the programs take: the source; of the prompts and, if they count, of the counterparts what is read
        and the domain."""
        arrays = [array for run in (self.run, self.other) for array in (run.read_BxTxD, run.domain_BxT)]
        return self.source, arrays if self.source.kind == "counterpart" else arrays[:2]

    def alike(self) -> np.ndarray:
        """``prefix_PxT`` as far as what is changed in the prompts is the same."""
        prefix_PxT, other_PxT = self.run.prefix_PxT, self.other.prefix_PxT
        if self.source.kind == "random":  # draws differ from prompt to prompt
            return all_different(prefix_PxT)
        both = self.source.kind == "counterpart"
        return prefix_PxT * (int(other_PxT.max(initial=0)) + 1) + other_PxT if both else prefix_PxT


class RowPlan(NamedTuple):
    """What is to be run on the prompts of one clean run."""

    ablated: AblatedRun
    prompts: Prompts
    batches: list[RowBatch]

    @classmethod
    def of(
        cls, split: SplitModel, ablated: AblatedRun, sets: Sequence[np.ndarray], batch_rows: int, plain: bool
    ) -> "RowPlan":
        """The rows of some sets; the last two, which are empty, are run on all tokens and on the last one.

        Args:
          split, batch_rows, plain: as for ``ablate_sets``.
          ablated: the prompts, and what stands in place of features.
          sets: of features.
        """
        run, (count, length) = ablated.run, ablated.run.prefix_PxT.shape
        alike_PxT = all_different(run.prefix_PxT) if plain else ablated.alike()
        prompts = Prompts(run.last_B[:count], alike_PxT)
        if plain:
            first_SxP = np.zeros((len(sets), count), np.int64)
        else:
            first_BxF = np.asarray(first_change(split.point, split.dictionary, *ablated.arrays))
            first_SxP = first_changes(first_BxF[:count], sets)
            first_SxP[-2], first_SxP[-1] = 0, prompts.last_P
        shards = split.point.mesh.shape["data"]
        return cls(ablated, prompts, batches_of(first_SxP, prompts, sets, batch_rows * length, FEATURES, shards))


def changes(split: SplitModel, ablated: AblatedRun, features: Sequence[int]) -> np.ndarray:
    """Inner products of what removing each of K features changes at the site, summed over positions, fp64 [K, K].

    What removing a set changes is the sum of what removing its features does, so that the sum of its block of this
    matrix is the squared norm of the whole change.
    """
    features_K = np.asarray(features, np.int64)
    filled_J = np.resize(features_K, 2 ** max(len(features_K) - 1, 0).bit_length())  # programs of few sizes
    count, run = len(ablated.run.index_P), ablated.run
    removed_BxTxJ, W_dec_JxD = gather(split.point, split.dictionary, *ablated.arrays, filled_J, count)
    real_PxT = np.arange(run.prefix_PxT.shape[1])[None, :] <= run.last_B[:count, None]
    removed_NxK = np.asarray(removed_BxTxJ)[:count][real_PxT][:, : len(features_K)].astype(np.float64)
    W_dec_KxD = np.asarray(W_dec_JxD)[: len(features_K)].astype(np.float64)
    return (removed_NxK.T @ removed_NxK) * (W_dec_KxD @ W_dec_KxD.T)


def _decisive(plans: Sequence[RowPlan], sets: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """What decides each batch's values, beside the model, the dictionary, the prompts and the activation source."""
    yield from sets
    for plan in plans:
        for batch in plan.batches:
            yield np.array([batch.size, batch.length, batch.tokens])
            for shard in batch.shards:
                yield from (shard.set_N, shard.place_N, shard.first_N)


def _measure(
    split: SplitModel,
    plans: Sequence[RowPlan],
    sets: Sequence[np.ndarray],
    readouts: bool,
    chunks: Chunks,
    on_progress: Callable[[int, int], None],
) -> None:
    """Runs the batches that ``chunks`` lacks."""
    before = len(chunks.values)
    left = [batch for plan in plans for batch in plan.batches][before:]
    done, total = 0, sum(batch.tokens * len(batch.shards) for batch in left)
    on_progress(0, total)
    with chunks:
        for batch, device_SxRxM in zip(left, lagging(_dispatched(split, plans, sets, readouts, before)), strict=True):
            values_SxRxM = np.asarray(device_SxRxM)
            real_SxR = np.arange(batch.size)[None, :] < np.array([[len(shard.set_N)] for shard in batch.shards])
            if not np.isfinite(values_SxRxM[real_SxR]).all():
                raise UserError(
                    f"a logit difference after an edit at {split.point.site} is not finite: the model or the "
                    "dictionary holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
                )
            chunks.add(values_SxRxM)
            done += batch.tokens * len(batch.shards)
            on_progress(done, total)


def _dispatched(
    split: SplitModel, plans: Sequence[RowPlan], sets: Sequence[np.ndarray], readouts: bool, before: int
) -> Iterator[jax.Array]:
    """Starts the tail on the rows of all batches but the first so many; yields each one's readouts."""
    for ablated, prompts, batches in plans:
        left, before = batches[before:], max(before - len(batches), 0)
        if not left:
            continue
        run = ablated.run
        end_BxD, past = split.past(run)
        logp_BxV = clean_logp(split.point, split.params, end_BxD) if readouts else None
        clean, features_K = None, None
        for batch in left:
            if features_K is not batch.features_K:
                features_K = batch.features_K
                removed_BxTxK, W_dec_KxD = gather(
                    split.point, split.dictionary, *ablated.arrays, features_K, len(run.index_P)
                )
                clean = CleanValues(run.stream_BxTxD, run.value_BxTxD, removed_BxTxK, W_dec_KxD, past, logp_BxV)
            tree, rows = batch.filled(prompts, sets)
            placed = SharedPrefixBatch(*split.by_row(*tree))
            others = split.by_row(*rows, run.answers_Bx2[tree.prompt_SxR])
            yield run_rows(split.point, split.params, clean, placed, *others)


def lagging(items: Iterable) -> Iterator:
    """Runs ``_IN_FLIGHT`` items ahead of its reader."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > _IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting
