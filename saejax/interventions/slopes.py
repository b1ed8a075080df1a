"""Slopes of readouts at a site, and the attribution of features: estimates from one backward pass per prompt.

The attribution of feature i on a prompt is activation x gradient,

    a_i = sum_t f_{t,i} <dL/dx_t, W_dec_i>,    L = logit(correct) - logit(wrong) at the last position,

the first-order estimate of how much L falls when the feature is removed, x_t -> x_t - f_{t,i} W_dec_i
(attribution patching; Nanda, 2023; for dictionaries, Marks et al., 2024, arXiv 2403.19647). With a replacement r of
activations, f_{t,i} - r_{t,i} stands for f_{t,i}; of random replacements their mean. Attribution chooses features;
their effects are then measured exactly.

Integrated attribution takes the mean slope along the straight path on which all features are replaced together, at the
midpoints of ``steps`` equal parts, in place of the slope at its beginning (Sundararajan et al., 2017, arXiv 1703.01365;
for features Marks et al., equation 4). The attributions of all features then add up to what replacing all of them
costs.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from saejax.arguments import check_classes
from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError, one_of
from saejax.interventions.activity import count_run
from saejax.interventions.controls import begins_answer
from saejax.interventions.edits import ZERO, ActivationReplacement, removed_on_average
from saejax.interventions.split_model import (
    CleanRun,
    SiteRows,
    SplitModel,
    active_features,
    not_finite,
    prompts_at_once,
)
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.split import Ends, SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import BY_DOCUMENT, by_row, fitting_sharding, sharding
from saejax.progress import OnProgress, show_progress, silent
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

TARGETS = 16  # targets whose slopes are computed together: as many times the tokens of a batch
TARGET_PROMPTS = 8  # prompts of the batch, at most: a power of two


@check_classes
def slopes(
    lm: LanguageModel, prompts: Sequence[Prompt], readout: str, site: str, on_progress: OnProgress | None = None
) -> np.ndarray:
    """Return the gradient of a readout with respect to the value of a site.

    Args:
      lm: the model.
      prompts: P prompts with a correct and a wrong answer.
      readout: ``logit_diff``, or ``log_prob`` of the correct answer's first token.
      site: such as ``resid_post.15``.
      on_progress: called with the prompts done and to do; None: a bar, where somebody looks on.

    Returns:
      Float32 array ``[P, T, D]``, in logits or nats per unit of the site; 0 beyond a prompt's last token.

    Raises:
      UserError: the readout or the site does not exist, or the gradient is not finite.
    """
    one_of(readout, ("logit_diff", "log_prob"), "readout with a gradient")
    where = Site.parse(site).check(lm.config)
    point = SplitPoint(lm.config, where, where, lm.mesh, lm.rules)
    tokens = lm.tokenize([prompt.text for prompt in prompts])
    answers_Px2 = first_answer_ids(lm.tokenizer, prompts)
    parts, size = [], prompts_at_once(tokens.ids_BxT.shape[1])
    with show_progress("slopes") as bar:
        for first in range(0, len(prompts), size):
            # The last batch is padded with copies, so that one program serves all.
            rows_B = np.minimum(np.arange(first, first + size), len(prompts) - 1)
            arrays = by_row(lm.mesh, *(array[rows_B] for array in (tokens.ids_BxT, tokens.last_B, answers_Px2)))
            parts.append(to_host(_readout_slopes(point, readout, lm.params, *arrays))[: len(prompts) - first])
            (on_progress or bar)(min(first + size, len(prompts)), len(prompts))
    slope_PxTxD = np.concatenate(parts).astype(np.float32, copy=False)
    if not np.isfinite(slope_PxTxD).all():
        raise UserError(not_finite(point, f"at {point.site}"))
    return slope_PxTxD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _readout_slopes(
    point: SplitPoint,
    readout: str,
    params: decoder.Params,
    ids_BxT: jax.Array,
    last_B: jax.Array,
    answers_Bx2: jax.Array,
) -> jax.Array:
    """Return the slope of a readout (static) with respect to the site's value, [B, T, D]; see ``run_head``."""
    stream_BxTxX, value_BxTxD, _ = point.run_prefix(params, ids_BxT)

    def total(value_BxTxD: jax.Array) -> jax.Array:
        x = point.run_suffix(params, stream_BxTxX, value_BxTxD)
        # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
        if readout == "logit_diff":
            return point.logit_difference(params, x, last_B, answers_Bx2).sum()
        last = jnp.take_along_axis(x, last_B[:, None, None], axis=1)[:, 0]
        logp_BxV = jax.nn.log_softmax(decoder.unembed(point.config, params, last, point.rules))
        return jnp.take_along_axis(logp_BxV, answers_Bx2[:, :1], axis=1).sum()

    return jax.lax.with_sharding_constraint(jax.grad(total)(value_BxTxD), sharding(point.mesh))


def likely_tokens(split: SplitModel, runs: Sequence[CleanRun], most: int) -> np.ndarray:
    """Return the tokens that are among the ``most`` likeliest next ones after some prompt, rising.

    Args:
      split: the model.
      runs: from ``split.run``.
      most: number of tokens of each prompt.
    """
    most = min(most, split.point.config.vocab)
    likeliest = [
        np.asarray(_likeliest(split.point, most, split.params, split.past(run)[0]))[: len(run.index_P)] for run in runs
    ]
    return np.unique(np.concatenate(likeliest))


def neutral_tokens(tokenizer: Any, tokens: np.ndarray, answers: Collection[str]) -> np.ndarray:
    """Return the tokens that are words and the beginning of no answer: placebo targets are made of them.

    Args:
      tokenizer: tokenizer of the model.
      tokens: token ids.
      answers: right and wrong ones of all prompts.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))

    def is_neutral(token: int) -> bool:
        text = tokenizer.decode([token])
        # A token that is part of a character is no word that could be an answer.
        is_word = token not in special and bool(text.strip()) and "\N{REPLACEMENT CHARACTER}" not in text
        return is_word and not begins_answer(text, answers)

    return np.array([token for token in tokens.tolist() if is_neutral(token)], np.int64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(point: SplitPoint, most: int, params: decoder.Params, end_BxD: jax.Array) -> jax.Array:
    logits_BxV = decoder.unembed(point.config, params, end_BxD, point.rules)
    return jax.lax.with_sharding_constraint(jax.lax.top_k(logits_BxV, most)[1], sharding(point.mesh))


def attribution(
    split: SplitModel,
    runs: Sequence[CleanRun],
    source: ActivationReplacement = ZERO,
    steps: int = 0,
    slopes_of: Sequence[Sequence[np.ndarray]] | None = None,
) -> np.ndarray:
    """Return activation x slope of every feature on every prompt.

    Args:
      split: the model, split at the site that the dictionary writes to.
      runs: from ``split.run``, with counterparts for the source ``counterpart``; N prompts in all.
      source: what replaces activations.
      steps: points of the path over which slopes are averaged; 0: the slope without an edit.
      slopes_of: ``answer_slopes`` of the same prompts, if they were computed before; dictionaries of a site share them.

    Returns:
      fp32 [N, F] in logits; above 0 where ablating the feature should lower the logit difference.
      Attention sinks and padding contribute nothing.

    Raises:
      UserError: the result is not finite.
    """
    shape = sum(len(run.index_P) for run in runs), split.dictionary.config.n_features
    attribution_NxF = np.zeros(shape, np.float32)
    for run, some in zip(runs, slopes_of or answer_slopes(split, runs, source, steps), strict=True):
        for (part, rows), slope_1xBxTxD in zip(split.slices(run), some, strict=True):
            arrays, index_P = _source_arrays(split, run, source, part), run.index_P[part]
            scores_1xBxF = score_slopes(split.point, split.dictionary, rows, slope_1xBxTxD, None, source, arrays)
            attribution_NxF[index_P] = to_host(scores_1xBxF)[0, : len(index_P)]
    if not np.isfinite(attribution_NxF).all():
        raise UserError(not_finite(split.point, f"at {split.point.site}"))
    return attribution_NxF


def answer_slopes(
    split: SplitModel, runs: Sequence[CleanRun], source: ActivationReplacement = ZERO, steps: int = 0
) -> list[list[np.ndarray]]:
    """Return the slope of the logit difference at the site, [1, B, T, D] for each of ``split.slices`` of each run."""
    slopes_of: list[list[np.ndarray]] = []
    for run in runs:
        some = []
        for part, rows in split.slices(run):
            arrays = _source_arrays(split, run, source, part) if steps else ()
            some.append(to_host(_mean_slopes(split, rows, run.answers_Bx2[None, part], source, arrays, steps)))
        slopes_of.append(some)
    return slopes_of


def target_attributions(
    splits: Sequence[SplitModel],
    runs_of: Sequence[Sequence[CleanRun]],
    targets_Rx2: np.ndarray,
    source: ActivationReplacement = ZERO,
    on_progress: OnProgress = silent,
    steps: int = 0,
) -> list[np.ndarray]:
    """Return each feature's attribution for R pairs of tokens, mean over prompts, float64 [R, F] of each dictionary.

    The attribution is as in ``attribution``, with logit(first token) - logit(second token) as L on every prompt. The
    slopes, which take nearly all of the time, are computed once for all dictionaries.

    Args:
      splits: the model, split at one site, with each dictionary.
      runs_of: for each of them ``split.run`` of the same prompts.
      targets_Rx2: token ids.
      source: what replaces activations; not ``counterpart``.
      on_progress: called with the pairs of a prompt and a target that are done and in total; may raise to stop.
      steps: as for ``attribution``.

    Raises:
      UserError: the result is not finite.
    """
    if any(split.point != splits[0].point for split in splits) or (steps and len(splits) > 1):
        raise ValueError("slopes are shared by dictionaries of one site alone, and not on the path of one of them")
    count = len(targets_Rx2)
    # Targets are repeated to fill the last group: one program for all.
    padded = np.resize(targets_Rx2, (-(-count // TARGETS) * TARGETS, 1, 2)).astype(np.int32)
    totals = [np.zeros((len(padded), split.dictionary.config.n_features)) for split in splits]
    prompts, done = sum(len(run.index_P) for run in runs_of[0]), 0
    for runs in zip(*runs_of, strict=True):
        pairs = list(zip(splits, runs, strict=True))
        arrays = [_source_arrays(split, run, source) for split, run in pairs]
        for parts in zip(*(split.slices(run, TARGET_PROMPTS) for split, run in pairs), strict=True):
            part, rows = parts[0][0], [each for _, each in parts]
            real_B = np.arange(part.start, part.stop) < len(runs[0].index_P)
            targets = np.broadcast_to(padded, (len(padded), len(real_B), 2))
            for first in range(0, len(padded) if real_B.any() else 0, TARGETS):
                on_progress(done, count * prompts)
                chunk = slice(first, first + TARGETS)
                slope_CxBxTxD = _mean_slopes(splits[0], rows[0], targets[chunk], source, arrays[0], steps)
                for total, split, *read in zip(totals, splits, rows, arrays, strict=True):
                    fixed = split.point, split.dictionary, read[0], slope_CxBxTxD
                    total[chunk] += to_host(score_slopes(*fixed, real_B, source, read[1]))
                done += int(real_B.sum()) * min(TARGETS, count - first)
    if not all(np.isfinite(total).all() for total in totals):
        raise UserError(not_finite(splits[0].point, f"at {splits[0].point.site}"))
    return [total[:count] / prompts for total in totals]


def _mean_slopes(
    split: SplitModel,
    rows: SiteRows,
    targets_CxBx2: np.ndarray,
    source: ActivationReplacement,
    arrays: tuple[jax.Array, ...],
    steps: int,
) -> jax.Array:
    """Return the slopes of C targets of each row, mean over the path, [C, B, T, D]."""
    total_CxBxTxD: jax.Array | None = None
    for some in _along_path(split, rows, source, arrays, steps):
        slope_CxBxTxD = target_slopes(split.point, split.params, some, targets_CxBx2)
        total_CxBxTxD = slope_CxBxTxD if total_CxBxTxD is None else total_CxBxTxD + slope_CxBxTxD
    assert total_CxBxTxD is not None
    return total_CxBxTxD / steps if steps else total_CxBxTxD


def _along_path(
    split: SplitModel, rows: SiteRows, source: ActivationReplacement, arrays: tuple[jax.Array, ...], steps: int
) -> Iterator[SiteRows]:
    """Yield the rows at the midpoints of ``steps`` parts of the path; the rows themselves if that is 0."""
    if not steps:
        yield rows
    for step in range(steps):
        share = np.float32((step + 0.5) / steps)
        value_BxTxD = _replace_share(split.point, split.dictionary, rows, source, arrays, share)
        yield rows._replace(value_BxTxD=value_BxTxD)


@functools.partial(jax.jit, static_argnums=0)
def _replace_share(
    point: SplitPoint,
    dictionary: Dictionary,
    rows: SiteRows,
    source: ActivationReplacement,
    source_arrays: tuple[jax.Array, ...],
    share: jax.Array,
) -> jax.Array:
    """Return the site's value where a share of every activation is replaced, [B, T, D]."""
    fall_BxTxF = share * _mean_fall(dictionary, rows, source, source_arrays)
    W_dec_FxD = dictionary.W_dec_FxD[...].astype(fall_BxTxF.dtype)
    value_BxTxD = rows.value_BxTxD.astype(fall_BxTxF.dtype) - matmul(fall_BxTxF, W_dec_FxD)
    return jax.lax.with_sharding_constraint(value_BxTxD.astype(rows.value_BxTxD.dtype), sharding(point.mesh))


def _source_arrays(
    split: SplitModel, run: CleanRun, source: ActivationReplacement, part: slice | None = None
) -> tuple[jax.Array, ...]:
    """Return what ``_mean_fall`` needs beside the rows: nothing for most replacements.

    For ``counterpart`` what is read and the domain of the counterparts of some rows (``part``); for ``random`` at how
    many positions of the clean run each feature is not 0, and the sum of its activations.
    """
    if source.kind == "counterpart" and run.counterpart:
        return tuple(split.by_row(run.counterpart.read_BxTxD[part], run.counterpart.domain_BxT[part]))
    counts = count_run(split, run) if source.kind == "random" else None
    return () if counts is None else (counts.nonzero_F, counts.total_F)


def leaders(attribution_F: np.ndarray, top: int) -> list[int]:
    """Return the features of largest attribution, largest first: at most ``top``, only those above 0."""
    # Stable, so that the same ones of equal features lead on every machine.
    order_K = np.argsort(-attribution_F, kind="stable")[:top]
    return [int(feature) for feature in order_K if attribution_F[feature] > 0]


@functools.partial(jax.jit, static_argnums=0)
def target_slopes(point: SplitPoint, params: decoder.Params, rows: SiteRows, targets_CxBx2: jax.Array) -> jax.Array:
    """Return the slope of the difference of C targets of each prompt at the site, [C, B, T, D].

    The layers above the site run forward once and backward once per target.

    Args:
      point: where the model is split (static).
      params: parameters of the decoder.
      rows: clean values of the prompts.
      targets_CxBx2: token ids; of several readouts of the user the number of one, in the first column.
    """

    def run(value_BxTxD: jax.Array) -> Ends:
        return point.run_ends(params, rows.stream_BxTxX, value_BxTxD, rows.last_B)

    # One forward pass for all targets; only the pullback is mapped over them.
    ends, pullback = jax.vjp(run, rows.value_BxTxD)

    def difference(ends: Ends, target_Bx2: jax.Array, measured: SplitPoint = point) -> jax.Array:
        # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
        return measured.readouts(params, ends, rows.last_B, target_Bx2)[:, 0].sum()

    if point.readout and len(point.readout.functions) > 1:
        alone = [dataclasses.replace(point.readout, functions=(function,)) for function in point.readout.functions]
        points = [dataclasses.replace(point, readout=readout) for readout in alone]
        branches = [functools.partial(jax.grad(difference), measured=each) for each in points]
        # One function at a time: together they would take as many times the logits of the whole vocabulary.
        end_slopes = jax.lax.map(
            lambda target_Bx2: jax.lax.switch(target_Bx2[0, 0], branches, ends, target_Bx2), targets_CxBx2
        )
    else:
        end_slopes = jax.vmap(jax.grad(difference), in_axes=(None, 0))(ends, targets_CxBx2)
    slope_CxBxTxD = jax.vmap(lambda cotangent: pullback(cotangent)[0])(end_slopes)
    return jax.lax.with_sharding_constraint(slope_CxBxTxD, place_slopes(point.mesh, slope_CxBxTxD.shape))


def place_slopes(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Return where slopes [C, B, T, D] are: with their prompts, which are split over ``member`` and ``data``."""
    return fitting_sharding(mesh, shape, None, BY_DOCUMENT, None, None)


@functools.partial(jax.jit, static_argnums=0)
def score_slopes(
    point: SplitPoint,
    dictionary: Dictionary,
    rows: SiteRows,
    slope_CxBxTxD: jax.Array,
    real_B: jax.Array | None,
    source: ActivationReplacement,
    source_arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """Return the attribution of every feature for C targets of each prompt, given their slopes.

    Args:
      point: where the model is split (static).
      dictionary: a dictionary of the site.
      rows: clean values of the prompts, as the dictionary reads them.
      slope_CxBxTxD: from ``target_slopes``.
      real_B: the rows whose sum [C, F] is returned: not copies that pad a batch. None: every row, [C, B, F].
      source: what replaces activations.
      source_arrays: see ``_source_arrays``.
    """
    removed_BxTxF = _mean_fall(dictionary, rows, source, source_arrays)
    W_dec_FxD = dictionary.W_dec_FxD[...]

    def score(slope_BxTxD: jax.Array) -> jax.Array:
        score_BxF = weighted(removed_BxTxF, slope_BxTxD, W_dec_FxD)
        return score_BxF if real_B is None else jnp.where(real_B[:, None], score_BxF, 0.0).sum(axis=0)

    # One target at a time: [C, B, T, F] would be large.
    return jax.lax.with_sharding_constraint(jax.lax.map(score, slope_CxBxTxD), sharding(point.mesh))


def _mean_fall(
    dictionary: Dictionary, rows: SiteRows, source: ActivationReplacement, source_arrays: tuple[jax.Array, ...]
) -> jax.Array:
    """Return by how much every activation falls, f - r, in the mean over draws of r: [B, T, F]."""
    f_BxTxF = active_features(dictionary, rows.read_BxTxD, rows.domain_BxT)
    if source.kind == "random":
        return removed_on_average(f_BxTxF, *source_arrays)
    counterpart_BxTxF = active_features(dictionary, *source_arrays) if source_arrays else f_BxTxF
    every_F = jnp.arange(f_BxTxF.shape[-1])
    return source.removed(f_BxTxF, counterpart_BxTxF, rows.domain_BxT, every_F, jnp.int32(len(rows.last_B)))


def weighted(f_BxTxF: jax.Array, slope_BxTxD: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Return ``f_BxTxF`` x slope along each row of ``W_dec_FxD``, summed over positions: [B, F]."""
    # Not in the dtype of the rows, which may be bfloat16.
    along_BxTxF = matmul(slope_BxTxD.astype(f_BxTxF.dtype), W_dec_FxD.T)  # dL/df
    return (f_BxTxF * along_BxTxF).sum(axis=1)
