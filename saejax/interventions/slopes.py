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

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from saejax.models.split import SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row, sharding
from saejax.progress import OnProgress, show_progress, silent
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

TARGETS = 16  # targets whose slopes are computed together: as many times the tokens of a batch
TARGET_PROMPTS = 8  # prompts of that batch, at most: a power of two


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
    stream_BxTxD, value_BxTxD, _ = point.run_prefix(params, ids_BxT)

    def total(value_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = point.run_suffix(params, stream_BxTxD, value_BxTxD)
        # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
        if readout == "logit_diff":
            return point.logit_difference(params, x_BxTxD, last_B, answers_Bx2).sum()
        last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        logp_BxV = jax.nn.log_softmax(decoder.unembed(point.config, params, last_BxD, point.rules))
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
    """Return those of some tokens that are words and the beginning of no answer: placebo targets are made of them.

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
    split: SplitModel, runs: Sequence[CleanRun], source: ActivationReplacement = ZERO, steps: int = 0
) -> np.ndarray:
    """Return activation x slope of every feature on every prompt.

    Args:
      split: the model, split at the site that the dictionary writes to.
      runs: from ``split.run``, with counterparts for the source ``counterpart``; N prompts in all.
      source: what replaces activations.
      steps: points of the path over which slopes are averaged; 0: the slope without an edit.

    Returns:
      fp32 [N, F] in logits; above 0 where ablating the feature should lower the logit difference.
      Attention sinks and padding contribute nothing.

    Raises:
      UserError: the result is not finite.
    """
    shape = sum(len(run.index_P) for run in runs), split.dictionary.config.n_features
    attribution_NxF = np.zeros(shape, np.float32)
    for run in runs:
        arrays = _random_sums(split, run, source)
        for part, rows in split.slices(run):
            if source.kind == "counterpart" and run.counterpart:
                arrays = tuple(split.by_row(run.counterpart.read_BxTxD[part], run.counterpart.domain_BxT[part]))
            model, targets_1xBx2 = (split.point, split.params, [split.dictionary]), run.answers_Bx2[None, part]
            index_P = run.index_P[part]
            for some in _along_path(split, rows, source, arrays, steps):
                (scores_1xBxF,) = score_targets(*model, [some], None, targets_1xBx2, source, [arrays])
                attribution_NxF[index_P] += to_host(scores_1xBxF)[0, : len(index_P)] / max(steps, 1)
    if not np.isfinite(attribution_NxF).all():
        raise UserError(not_finite(split.point, f"at {split.point.site}"))
    return attribution_NxF


def target_attributions(
    splits: Sequence[SplitModel],
    runs_of: Sequence[Sequence[CleanRun]],
    targets_Rx2: np.ndarray,
    source: ActivationReplacement = ZERO,
    on_progress: OnProgress = silent,
    steps: int = 0,
) -> list[np.ndarray]:
    """Return each feature's attribution for R pairs of tokens, mean over prompts, float64 [R, F] of each dictionary.

    The attribution is that of ``attribution``, with logit(first token) - logit(second token) as L on every prompt. The
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
    model, count = (splits[0].point, splits[0].params, [split.dictionary for split in splits]), len(targets_Rx2)
    # Targets are repeated to fill the last group: one program for all.
    padded = np.resize(targets_Rx2, (-(-count // TARGETS) * TARGETS, 1, 2)).astype(np.int32)
    totals = [np.zeros((len(padded), split.dictionary.config.n_features)) for split in splits]
    prompts, done = sum(len(run.index_P) for run in runs_of[0]), 0
    for runs in zip(*runs_of, strict=True):
        pairs = list(zip(splits, runs, strict=True))
        sums = [_random_sums(split, run, source) for split, run in pairs]
        for parts in zip(*(split.slices(run, TARGET_PROMPTS) for split, run in pairs), strict=True):
            part, rows = parts[0][0], [each for _, each in parts]
            real_B = np.arange(part.start, part.stop) < len(runs[0].index_P)
            targets = np.broadcast_to(padded, (len(padded), len(real_B), 2))
            for first in range(0, len(padded) if real_B.any() else 0, TARGETS):
                on_progress(done, count * prompts)
                chunk = slice(first, first + TARGETS)
                for some in _along_path(splits[0], rows[0], source, sums[0], steps):
                    scores = score_targets(*model, [some, *rows[1:]], real_B, targets[chunk], source, sums)
                    for total, scores_CxF in zip(totals, scores, strict=True):
                        total[chunk] += to_host(scores_CxF) / max(steps, 1)
                done += int(real_B.sum()) * min(TARGETS, count - first)
    if not all(np.isfinite(total).all() for total in totals):
        raise UserError(not_finite(splits[0].point, f"at {splits[0].point.site}"))
    return [total[:count] / prompts for total in totals]


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


def answer_slopes(split: SplitModel, runs: Sequence[CleanRun]) -> list[list[np.ndarray]]:
    """Return the slope of the logit difference at the site, [B, T, D] for each of ``split.slices`` of each run."""
    return [[to_host(_answer_slope(split.point, split.params, rows)) for _, rows in split.slices(run)] for run in runs]


def attribute_slopes(
    split: SplitModel,
    runs: Sequence[CleanRun],
    slopes_of: Sequence[Sequence[np.ndarray]],
    source: ActivationReplacement = ZERO,
) -> np.ndarray:
    """Return each feature's attribution, mean over prompts, float64 [F], given slopes that dictionaries share.

    Args:
      split: the model with the dictionary.
      runs: as for ``attribution``.
      slopes_of: from ``answer_slopes`` of the same prompts.
      source: what replaces activations.

    Raises:
      UserError: the result is not finite.
    """
    total_F = np.zeros(split.dictionary.config.n_features)
    for run, some in zip(runs, slopes_of, strict=True):
        arrays = _random_sums(split, run, source)
        for (part, rows), slope_BxTxD in zip(split.slices(run), some, strict=True):
            if source.kind == "counterpart" and run.counterpart:
                arrays = tuple(split.by_row(run.counterpart.read_BxTxD[part], run.counterpart.domain_BxT[part]))
            real_B = np.arange(part.start, part.stop) < len(run.index_P)
            (slope_BxTxD,) = split.by_row(slope_BxTxD)
            total_F += to_host(_score_slope(split.point, split.dictionary, rows, slope_BxTxD, real_B, source, arrays))
    if not np.isfinite(total_F).all():
        raise UserError(not_finite(split.point, f"at {split.point.site}"))
    return total_F / sum(len(run.index_P) for run in runs)


@functools.partial(jax.jit, static_argnums=0)
def _answer_slope(point: SplitPoint, params: decoder.Params, rows: SiteRows) -> jax.Array:
    def total(value_BxTxD: jax.Array) -> jax.Array:
        x = point.run_suffix(params, rows.stream_BxTxD, value_BxTxD)
        # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
        return point.logit_difference(params, x, rows.last_B, rows.answers_Bx2).sum()

    return jax.lax.with_sharding_constraint(jax.grad(total)(rows.value_BxTxD), sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def _score_slope(
    point: SplitPoint,
    dictionary: Dictionary,
    rows: SiteRows,
    slope_BxTxD: jax.Array,
    real_B: jax.Array,
    source: ActivationReplacement,
    source_arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """Return the sum of each feature's attribution over the real rows, [F]."""
    score_BxF = weighted(_mean_fall(dictionary, rows, source, source_arrays), slope_BxTxD, dictionary.W_dec_FxD[...])
    score_F = jnp.where(real_B[:, None], score_BxF, 0.0).sum(axis=0)
    return jax.lax.with_sharding_constraint(score_F, sharding(point.mesh))


def _random_sums(split: SplitModel, run: CleanRun, source: ActivationReplacement) -> tuple[jax.Array, ...]:
    """Return what ``removed_on_average`` needs of a clean run; nothing unless activations are drawn at random."""
    counts = count_run(split, run) if source.kind == "random" else None
    return () if counts is None else (counts.nonzero_F, counts.total_F)


def leaders(attribution_F: np.ndarray, top: int) -> list[int]:
    """Return the features of largest attribution, largest first: at most ``top``, only those above 0."""
    # Stable, so that of equal features the same ones lead on every machine.
    order_K = np.argsort(-attribution_F, kind="stable")[:top]
    return [int(feature) for feature in order_K if attribution_F[feature] > 0]


@functools.partial(jax.jit, static_argnums=0)
def score_targets(
    point: SplitPoint,
    params: decoder.Params,
    dictionaries: Sequence[Dictionary],
    rows_of: Sequence[SiteRows],
    real_B: jax.Array | None,
    targets_CxBx2: jax.Array,
    source: ActivationReplacement,
    source_arrays_of: Sequence[tuple[jax.Array, ...]],
) -> list[jax.Array]:
    """Return the attribution of every feature for C targets of each prompt, for each dictionary.

    The layers above the site run forward once and backward once per target.

    Args:
      point: where the model is split (static).
      params: parameters of the decoder.
      dictionaries: dictionaries of the site.
      rows_of: clean values of the same prompts, as each dictionary reads them.
      real_B: the rows whose sum [C, F] is returned: not copies that pad a batch. None: every row, [C, B, F].
      targets_CxBx2: token ids.
      source: what replaces activations.
      source_arrays_of: for each dictionary and the source ``counterpart`` what is read and the domain of the
        counterparts; for ``random``, at how many positions of the clean run each feature is not 0, and the sum of its
        activations.
    """
    first = rows_of[0]

    def end(value_BxTxD: jax.Array) -> jax.Array:
        return point.ends(point.run_suffix(params, first.stream_BxTxD, value_BxTxD), first.last_B)

    # One forward pass for all targets; only the pullback is mapped over them.
    last_Bx, pullback = jax.vjp(end, first.value_BxTxD)

    def difference(last_Bx: jax.Array, target_Bx2: jax.Array) -> jax.Array:
        # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
        return point.readouts(params, last_Bx, target_Bx2)[:, 0].sum()

    end_slope_CxBx = jax.vmap(jax.grad(difference), in_axes=(None, 0))(last_Bx, targets_CxBx2)
    slope_CxBxTxD = jax.vmap(lambda cotangent_Bx: pullback(cotangent_Bx)[0])(end_slope_CxBx)

    def score(dictionary: Dictionary, rows: SiteRows, source_arrays: tuple[jax.Array, ...]) -> jax.Array:
        removed_BxTxF = _mean_fall(dictionary, rows, source, source_arrays)
        W_dec_FxD = dictionary.W_dec_FxD[...]

        def one_target(slope_BxTxD: jax.Array) -> jax.Array:
            score_BxF = weighted(removed_BxTxF, slope_BxTxD, W_dec_FxD)
            return score_BxF if real_B is None else jnp.where(real_B[:, None], score_BxF, 0.0).sum(axis=0)

        # One target at a time: [C, B, T, F] would be large.
        return jax.lax.map(one_target, slope_CxBxTxD)

    scores = [score(*each) for each in zip(dictionaries, rows_of, source_arrays_of, strict=True)]
    return jax.lax.with_sharding_constraint(scores, sharding(point.mesh))


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
