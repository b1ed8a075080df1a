"""Exact effects of edits: each edit on each prompt, each readout.

    effects(lm, prompts, edits, readouts)    [E, P, R]
    slopes(lm, prompts, readout, site)       [P, T, D]   (saejax.interventions.slopes)

An edit of features changes the site's value at every editable position (``saejax.interventions.edits``),

    x'_t = x_t - sum_i (a_i (f_{t,i} - r_{t,i}) - b_i) W_dec_i,

where f is computed once, from the clean x. One *row* of work is one (edit, prompt). What cannot matter is not computed:

1. The layers below the site run once per prompt (``SplitModel.run``), and so do the keys and values of the layers
   above, which every token before the first edited one keeps.
2. A row whose edit changes nothing on its prompt is not run: its effect is exactly 0.
3. Prompts that begin alike, and are changed alike there, share those tokens (``saejax.interventions.rows``).
4. Of the vocabulary's logits two are computed, unless a readout needs all.

The rows go through one jitted program in batches of bounded size, sharded over the mesh's ``data`` axis.
"""

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from saejax.arguments import check_classes
from saejax.dictionaries.bos import follow_bos
from saejax.dictionaries.rescale import to_output_units
from saejax.errors import UserError, one_of
from saejax.interventions import controls
from saejax.interventions.controls import GatheredPrompts
from saejax.interventions.edits import ActivationReplacement, FeatureEdits
from saejax.interventions.references import Reference, References
from saejax.interventions.rows import (
    CleanValues,
    EditedRun,
    RowBatch,
    batches_of,
    clean_logp,
    edit_value,
    first_changes,
    first_falls,
    gather,
    run_rows,
)
from saejax.interventions.split_model import GROUP_TOKENS, CleanRun, SiteRows, SplitModel, in_order, not_finite
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.split import SharedPrefixBatch, SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import document_devices, sharding
from saejax.progress import OnProgress, show_progress, silent
from saejax.tasks.behaviours import Prompt
from saejax.tasks.likelihood import encode_pair

#: Readouts of a row: the logit difference, and readouts that need the logits of the whole vocabulary.
READOUTS = ("logit_diff", "log_prob", "top1", "kl")
#: Readouts of whole texts: the log-likelihood of the whole correct answer, and the prompt's cross-entropy per token.
TEXT_READOUTS = ("answer_log_prob", "ce")
BATCH_ROWS = 64
_IN_FLIGHT = 2  # batches on the device while the host waits for an earlier one


@check_classes
def effects(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    edits: FeatureEdits,
    readouts: Sequence[str] = ("logit_diff",),
    positions: str = "all",
    error: str = "keep",
    batch_rows: int = BATCH_ROWS,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Return readouts of each edit on each prompt.

    Args:
      lm: the model.
      prompts: P prompts with a correct and a wrong answer.
      edits: E edits of one dictionary's features, from a function of ``saejax.interventions.edits`` such as ``mask``.
      readouts: names from ``READOUTS`` and ``TEXT_READOUTS``, and ``change_norm``: the norm of the change at the site,
        over all positions.
      positions: the editable positions: all, last, or a slice such as 1:4 or -3:.
      error: "keep", or "drop": the clean run, too, goes through the dictionary.
      batch_rows: a batch holds as many tokens as this number of whole prompts: the bound of the memory in use.
      on_progress: called with the rows done and to do, at the start and after each batch; None: a bar, where somebody
        looks on.

    Returns:
      Float64 array ``[E, P, R]``: logits, nats or 0/1.

    Raises:
      UserError: a readout is unknown or not finite, or cannot be measured under these edits; a prompt is too long, or
        an answer has no token of its own.
    """
    if not isinstance(edits, FeatureEdits):
        raise UserError(
            f"edits is a {type(edits).__name__}: expected edits of one dictionary's features, such as "
            "saejax.interventions.edits.mask(dictionary, [[3], [8, 20]])"
        )
    if batch_rows < 1:
        raise UserError(f"batch_rows is {batch_rows}: expected 1 or more")
    if not readouts:
        raise UserError(f"readouts is empty: name some of {', '.join((*READOUTS, 'change_norm', *TEXT_READOUTS))}")
    for name in readouts:
        one_of(name, (*READOUTS, "change_norm", *TEXT_READOUTS), "readout")
        if name in TEXT_READOUTS and (positions, error) != ("all", "keep"):
            raise UserError(f"{name} is measured with edits at all positions and the error kept: use the defaults")
        if name in TEXT_READOUTS and edits.replacement.kind == "counterpart":
            raise UserError(f"{name} is measured on whole texts: use another edit than swap, which takes counterparts")
    has_amounts = edits.addends is not None or edits.replacement.kind == "mean"
    if has_amounts and to_output_units(edits.dictionary) is not edits.dictionary:
        raise UserError(
            "the dictionary normalises each token, so an activation adds another length at each: give amounts in "
            "units of the site, and the edits the dictionary saejax.dictionaries.rescale.to_output_units(dictionary)"
        )
    lm = follow_bos(lm, [edits.dictionary.config])
    split = SplitModel(lm, edits.dictionary, positions, error)
    values = {name: _whole_texts(lm, split, prompts, edits, name) for name in TEXT_READOUTS if name in readouts}
    # Readouts of whole texts have a program of their own: without others, prompts need not be run as well.
    if values.keys() >= set(readouts):
        return np.stack([values[name] for name in readouts], axis=-1)
    runs = split.run(prompts, counterparts=edits.replacement.kind == "counterpart")
    needs_vocabulary = any(name in READOUTS[1:] for name in readouts)
    with show_progress("effects") as bar:
        measured = run_edits(split, runs, edits, batch_rows, on_progress or bar, needs_vocabulary)
    if "change_norm" in readouts:
        values["change_norm"] = change_norms(split, runs, edits)
    values |= {name: value_ExP[1:] for name, value_ExP in measured.items()}
    return np.stack([values[name] for name in readouts], axis=-1)


def _whole_texts(
    lm: LanguageModel, split: SplitModel, prompts: Sequence[Prompt], edits: FeatureEdits, readout: str
) -> np.ndarray:
    """Return one of ``TEXT_READOUTS`` of each edit on each prompt, float64 ``[E, P]``."""
    if readout == "answer_log_prob":
        pairs = [encode_pair(lm.tokenizer, prompt.text, prompt.correct, lm.bos) for prompt in prompts]
    else:
        tokens = lm.tokenize([prompt.text for prompt in prompts])
        ids = [ids_T[:length].tolist() for ids_T, length in zip(tokens.ids_BxT, tokens.lengths_B, strict=True)]
        if short := [prompt.text for prompt, ids_T in zip(prompts, ids, strict=True) if len(ids_T) < 2]:
            raise UserError(f"the prompt {short[0]!r} has one token: cross-entropy takes at least two")
        # Cross-entropy of a text is the log-likelihood of all of it after its first token.
        pairs = [(ids_T[:1], ids_T[1:]) for ids_T in ids]
    references = [Reference(*pair) for pair in pairs]
    for prompt, reference in zip(prompts, references, strict=True):
        if len(reference) > lm.config.context:
            raise UserError(
                f"the prompt {prompt.text[:40]!r} has {len(reference)} tokens with its answer, more than the model's "
                f"context of {lm.config.context}: shorten it"
            )
    edited_ExP = References(split, references, GROUP_TOKENS).log_likelihoods(edits)[1:]
    return edited_ExP if readout == "answer_log_prob" else -edited_ExP / np.array([len(pair[1]) for pair in pairs])


def run_edits(
    split: SplitModel,
    runs: Sequence[CleanRun],
    edits: FeatureEdits,
    batch_rows: int = BATCH_ROWS,
    on_progress: OnProgress = silent,
    readouts: bool = False,
    snap_rounding: bool = False,
) -> dict[str, np.ndarray]:
    """Run S edits on prompts whose clean run is given.

    Args:
      split: the model, split at the site that the edits' dictionary writes to.
      runs: from ``split.run``; with counterparts for the replacement ``counterpart``.
      edits: edits of the split's dictionary.
      batch_rows: as for ``effects``.
      on_progress: as for ``effects``.
      readouts: whether all of ``READOUTS`` are measured, which takes the logits of the whole vocabulary; not with a
        readout of the user's.
      snap_rounding: whether changes of a logit difference that may be rounding are taken for none.

    Returns:
      The logit difference, or the user's readout, and, if asked for, the other readouts, float64 ``[1 + S, P]`` each:
      without an edit, then with each edit; equal to the last bit where the edit changes nothing.

    Raises:
      UserError: a readout is not finite, or both answers of a prompt begin with the same token.
    """
    for run in runs if split.point.readout is None else ():
        answers_Px2 = run.answers_Bx2[: len(run.index_P)]
        for place in np.flatnonzero(answers_Px2[:, 0] == answers_Px2[:, 1])[:1]:
            raise UserError(
                f"both answers of prompt {run.index_P[place]}, counted from 0, begin with the same token: their logit "
                "difference is always 0; give answers whose first tokens differ"
            )
    # Behind the edits stand clean runs: from the last token alone and, to see how far they round apart, from all.
    planned = edits.with_clean_rows(1 + snap_rounding)
    clean = len(edits)
    names = (split.objective, *READOUTS[1:]) if readouts else (split.objective,)
    prompts = sum(len(run.index_P) for run in runs)
    # NaN marks rows that are not run, because no readout of a finite run is NaN.
    values_MxExP = np.full((len(names), len(planned), prompts), np.nan)
    done, total = 0, len(planned) * prompts
    on_progress(0, total)
    started = (
        item
        for number, run in enumerate(runs)
        for item in _start(
            split, EditedRun(run, edits.replacement.of_run(number)), planned, clean, batch_rows, readouts
        )
    )
    # Results are fetched some batches later, so that the device has work while the host reads.
    for index_Q, batch, device_SxRxM in prefetch(started):
        for shard, values_RxM in zip(batch.shards, np.asarray(device_SxRxM), strict=True):
            # Rows that fill a batch are not prompts: what they hold is not looked at.
            values_NxM = values_RxM[: len(shard.set_N)]
            if not np.isfinite(values_NxM).all():
                raise UserError(not_finite(split.point, f"after an edit at {split.point.site}"))
            values_MxExP[:, shard.set_N, index_Q[shard.place_N]] = values_NxM.T
            done += len(shard.set_N)
        on_progress(done, total)
    if done < total:  # the rest are rows that are not run
        on_progress(total, total)
    clean_MxP = values_MxExP[:, clean]
    if readouts:
        # The divergence from itself, which rounding would leave a little off.
        clean_MxP[names.index("kl")] = 0.0
    # A row that was not run changes nothing.
    edited_MxSxP = np.where(np.isnan(values_MxExP[:, :clean]), clean_MxP[:, None, :], values_MxExP[:, :clean])
    if snap_rounding:
        # All edits share the rounding error of a prompt, which would make many small effects agree.
        is_rounding_SxP = np.abs(edited_MxSxP[0] - clean_MxP[0]) <= 4 * np.abs(values_MxExP[0, -1] - clean_MxP[0])
        edited_MxSxP[0] = np.where(is_rounding_SxP, clean_MxP[0], edited_MxSxP[0])
    pairs = zip(names, clean_MxP, edited_MxSxP, strict=True)
    return {name: np.vstack([clean_P, edited_SxP]) for name, clean_P, edited_SxP in pairs}


def gathered_prompts(
    split: SplitModel, runs: Sequence[CleanRun], source: ActivationReplacement
) -> Iterator[GatheredPrompts]:
    """Yield the prompts of clean runs, for ``controls.change_norms`` and ``controls.measure_changes``."""
    for number, run in enumerate(runs):
        arrays, count = EditedRun(run, source.of_run(number)).arrays, len(run.index_P)

        def gather_features(features_K: np.ndarray, arrays: Any = arrays, count: int = count) -> Any:
            return gather(split.point, split.dictionary, *arrays, features_K, count)

        yield GatheredPrompts(run.index_P, np.asarray(run.domain_BxT)[:count], gather_features)


def change_norms(split: SplitModel, runs: Sequence[CleanRun], edits: FeatureEdits) -> np.ndarray:
    """Return the norm of the change at the site, over all positions of each prompt, float64 ``[S, P]``."""
    prompts = sum(len(run.index_P) for run in runs)
    return controls.change_norms(gathered_prompts(split, runs, edits.replacement), edits, prompts)


def rank_logits(
    split: SplitModel, runs: Sequence[CleanRun], edit: FeatureEdits, is_allowed_V: np.ndarray, most: int
) -> np.ndarray:
    """Return the logits of each prompt's likeliest tokens without an edit, and with one.

    Args:
      split: the model.
      runs: from ``split.run``.
      edit: a single edit, which adds nothing.
      is_allowed_V: the tokens that are ranked, at least ``most``.
      most: number of tokens.

    Returns:
      Float64 array ``[2, most, P]``: the same tokens, first without the edit, by falling logit.
    """
    parts = []
    ((chosen, features_K),) = edit.chunks(max(len(edit.sets[0]), 1))
    fraction_K = edit.over(chosen, features_K)[0][0]
    for number, run in enumerate(runs):
        arrays = EditedRun(run, edit.replacement.of_run(number)).arrays
        fall_BxTxK, W_dec_KxD = gather(split.point, split.dictionary, *arrays, features_K, len(run.index_P))
        some = []
        for part, rows in split.slices(run):
            changes = fall_BxTxK[part], W_dec_KxD
            clean_NxV, edited_NxV = (
                to_host(_end_logits(split.point, split.params, rows, *changes, share * fraction_K)) for share in (0, 1)
            )
            order_NxR = np.argsort(-np.where(is_allowed_V, clean_NxV, -np.inf), axis=1, kind="stable")[:, :most]
            some.append(
                np.stack(
                    [np.take_along_axis(logits_NxV, order_NxR, axis=1) for logits_NxV in (clean_NxV, edited_NxV)], 1
                )
            )
        parts.append(np.concatenate(some))
    return np.moveaxis(in_order(parts, runs), 0, -1).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _end_logits(
    point: SplitPoint,
    params: decoder.Params,
    rows: SiteRows,
    fall_BxTxK: jax.Array,
    W_dec_KxD: jax.Array,
    fraction_K: jax.Array,
) -> jax.Array:
    """Return the logits of the next token after each prompt under an edit, [B, V]."""
    value_BxTxD = edit_value(rows.value_BxTxD, fall_BxTxK, W_dec_KxD, fraction_K[None, None, :])
    last = point.ends(point.run_suffix(params, rows.stream_BxTxX, value_BxTxD), rows.last_B)
    logits_BxV = decoder.unembed(point.config, params, last, point.rules)
    return jax.lax.with_sharding_constraint(logits_BxV, sharding(point.mesh))


def _start(
    split: SplitModel, edited: EditedRun, edits: FeatureEdits, clean: int, batch_rows: int, readouts: bool
) -> Iterator[tuple[np.ndarray, RowBatch, jax.Array]]:
    """Start the program on the batches of one clean run; yield the prompts' indices, the batch and its readouts.

    The empty edit at ``clean`` is run on the last token, those behind it on all tokens.
    """
    run, prompts, point = edited.run, edited.prompts, split.point
    count, length = prompts.prefix_PxT.shape
    end, past = split.past(run)
    logp_BxV = clean_logp(point, split.params, end) if readouts else None
    # Only addends need it: ablation changes nothing where activations are 0 already.
    editable_BxT = None if edits.addends is None else run.domain_BxT
    domain_PxT = np.asarray(run.domain_BxT)[:count]
    # Logits are read at the last few positions, so rows that are run hold these.
    latest_P = prompts.last_P - (point.positions - 1)
    for chosen, features_K in edits.chunks():
        fall_BxTxK, W_dec_KxD = gather(point, split.dictionary, *edited.arrays, features_K, count)
        first_PxK = np.asarray(first_falls(point, fall_BxTxK))[:count]
        first_MxP = first_changes(first_PxK, features_K, edits, chosen, domain_PxT)
        first_MxP = np.where(first_MxP <= prompts.last_P, np.minimum(first_MxP, latest_P), first_MxP)
        for first_P, number in zip(first_MxP, chosen, strict=True):
            if number >= clean:
                first_P[:] = latest_P if number == clean else 0
        changes = fall_BxTxK, W_dec_KxD, past, logp_BxV, editable_BxT
        values = CleanValues(run.stream_BxTxX, run.value_BxTxD, *changes)
        shards = document_devices(point.mesh)
        for batch in batches_of(first_MxP, prompts, chosen, features_K, batch_rows * length, shards):
            tree, end_SxC = batch.tree(prompts, point.positions)
            placed = SharedPrefixBatch(*split.by_row(*tree))
            end_SxC, answers_SxRx2 = split.by_row(end_SxC, run.answers_Bx2[tree.prompt_SxR])
            amounts = [array if array is None else split.by_row(array)[0] for array in batch.amounts(edits)]
            readout_SxRxM = run_rows(point, split.params, values, placed, end_SxC, answers_SxRx2, *amounts)
            yield run.index_P, batch, readout_SxRxM


def prefetch(items: Iterable) -> Iterator:
    """Run ``_IN_FLIGHT`` items ahead of the reader, so that the device never waits for the host."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > _IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting
