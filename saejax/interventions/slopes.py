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
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

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
from saejax.interventions.rows import EditedRun, PromptTree, prompt_trees
from saejax.interventions.split_model import (
    PROGRAM_TOKENS,
    CleanRun,
    SplitModel,
    active_features,
    not_finite,
    prompts_at_once,
)
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.split import Ends, PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import BY_DOCUMENT, by_row, document_devices, fitting_sharding, row_sharding, sharding
from saejax.progress import OnProgress, show_progress, silent
from saejax.tasks.answer_tokens import different_answer_ids, first_answer_ids
from saejax.tasks.behaviours import Prompt

TARGETS = 16  # targets whose slopes are computed together: as many times the tokens of a batch
TARGET_TOKENS = PROGRAM_TOKENS // 8  # tokens of such a batch, for each device


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
      UserError: the readout or the site does not exist, both answers of a prompt begin with the same token, or the
        gradient is not finite.
    """
    one_of(readout, ("logit_diff", "log_prob"), "readout with a gradient")
    where = Site.parse(site).check(lm.config)
    point = SplitPoint(lm.config, where, where, lm.mesh)
    tokens = lm.tokenize([prompt.text for prompt in prompts])
    read_ids = different_answer_ids if readout == "logit_diff" else first_answer_ids
    answers_Px2 = read_ids(lm, prompts)
    parts, size = [], prompts_at_once(tokens.ids_BxT.shape[1], document_devices(lm.mesh))
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

    Where all answers are numbers, every number may be right.

    Args:
      tokenizer: tokenizer of the model.
      tokens: token ids.
      answers: right and wrong ones of all prompts.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    are_numbers = all(answer.strip().isdecimal() for answer in answers)

    def is_neutral(token: int) -> bool:
        text = tokenizer.decode([token])
        # A token that is part of a character is no word that could be an answer.
        is_word = token not in special and bool(text.strip()) and "\N{REPLACEMENT CHARACTER}" not in text
        return is_word and not begins_answer(text, answers) and not (are_numbers and text.strip().isdecimal())

    return np.array([token for token in tokens.tolist() if is_neutral(token)], np.int64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(point: SplitPoint, most: int, params: decoder.Params, end_BxD: jax.Array) -> jax.Array:
    logits_BxV = decoder.unembed(point.config, params, end_BxD, point.rules)
    return jax.lax.with_sharding_constraint(jax.lax.top_k(logits_BxV, most)[1], sharding(point.mesh))


class AnswerSlopes(NamedTuple):
    """Slopes of the logit difference on some prompts of a clean run."""

    rows: PromptTree
    slope_1xSxNxD: jax.Array  #: of each token the sum over the prompts that share it, at the site


def attribution(
    split: SplitModel,
    runs: Sequence[CleanRun],
    source: ActivationReplacement = ZERO,
    steps: int = 0,
    slopes_of: Sequence[Sequence[AnswerSlopes]] | None = None,
) -> np.ndarray:
    """Return activation x slope of every feature, mean over prompts.

    Args:
      split: the model, split at the site that the dictionary writes to.
      runs: from ``split.run``, with counterparts for the source ``counterpart``.
      source: what replaces activations.
      steps: points of the path over which slopes are averaged; 0: the slope without an edit.
      slopes_of: ``answer_slopes`` of the same prompts, if they were computed before; dictionaries of a site share them.

    Returns:
      Float64 [F] in logits; above 0 where ablating the feature should lower the logit difference.
      Attention sinks and padding contribute nothing.

    Raises:
      UserError: the result is not finite.
    """
    total_F = np.zeros(split.dictionary.config.n_features)
    for run, some in zip(runs, slopes_of or answer_slopes(split, runs, source, steps), strict=True):
        sides = _sides(split, run, source)
        for rows, slope_1xSxNxD in some:
            scored_1xF = score_slopes(split.point, split.dictionary, sides, rows.tree, slope_1xSxNxD, source)
            # float64, because features of nearly equal attribution are ranked.
            total_F += to_host(scored_1xF)[0].astype(np.float64)
    if not np.isfinite(total_F).all():
        raise UserError(not_finite(split.point, f"at {split.point.site}"))
    return total_F / sum(len(run.index_P) for run in runs)


def answer_slopes(
    split: SplitModel, runs: Sequence[CleanRun], source: ActivationReplacement = ZERO, steps: int = 0
) -> list[list[AnswerSlopes]]:
    """Return the slopes of the logit difference at the site, for each of some runs."""
    slopes_of: list[list[AnswerSlopes]] = []
    for run in runs:
        some, sides = [], _sides(split, run, source)
        for rows in prompt_trees(split, EditedRun(run, source), PROGRAM_TOKENS):
            # Rows that fill a shard up take any answers.
            answers_1xSxRx2 = run.answers_Bx2[None, rows.place_SxR]
            some.append(AnswerSlopes(rows, _mean_slopes(split, run, rows, answers_1xSxRx2, source, sides, steps)))
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
    padded = np.resize(targets_Rx2, (-(-count // TARGETS) * TARGETS, 1, 1, 2)).astype(np.int32)
    totals = [np.zeros((len(padded), split.dictionary.config.n_features)) for split in splits]
    prompts, done = sum(len(run.index_P) for run in runs_of[0]), 0
    for runs in zip(*runs_of, strict=True):
        sides_of = [_sides(split, run, source) for split, run in zip(splits, runs, strict=True)]
        for rows in prompt_trees(splits[0], EditedRun(runs[0], source), TARGET_TOKENS, runs[1:]):
            targets = np.broadcast_to(padded, (len(padded), *rows.place_SxR.shape, 2))
            for first in range(0, len(padded), TARGETS):
                on_progress(done, count * prompts)
                chunk = slice(first, first + TARGETS)
                slope_CxSxNxD = _mean_slopes(splits[0], runs[0], rows, targets[chunk], source, sides_of[0], steps)
                for total, split, sides in zip(totals, splits, sides_of, strict=True):
                    scored = score_slopes(split.point, split.dictionary, sides, rows.tree, slope_CxSxNxD, source)
                    total[chunk] += to_host(scored)
                done += int(rows.is_prompt_X.sum()) * min(TARGETS, count - first)
    if not all(np.isfinite(total).all() for total in totals):
        raise UserError(not_finite(splits[0].point, f"at {splits[0].point.site}"))
    return [total[:count] / prompts for total in totals]


class Sides(NamedTuple):
    """Arrays of a clean run from which the falls of activations are computed."""

    read_BxTxD: jax.Array  #: what the dictionary reads
    domain_BxT: jax.Array  #: editable positions
    counterpart: tuple[jax.Array, jax.Array] | None  #: the same of the prompts' counterparts, for ``counterpart``
    #: for ``random``: at how many positions of the run each feature is not 0, and the sum of its activations, [F] each
    counts: tuple[jax.Array, jax.Array] | None


def _sides(split: SplitModel, run: CleanRun, source: ActivationReplacement) -> Sides:
    counterpart = counts = None
    if source.kind == "counterpart" and run.counterpart:
        counterpart = run.counterpart.read_BxTxD, run.counterpart.domain_BxT
    if source.kind == "random":
        firings = count_run(split, run)
        counts = firings.nonzero_F, firings.total_F
    return Sides(run.read_BxTxD, run.domain_BxT, counterpart, counts)


def _mean_slopes(
    split: SplitModel,
    run: CleanRun,
    rows: PromptTree,
    targets_CxSxRx2: np.ndarray,
    source: ActivationReplacement,
    sides: Sides,
    steps: int,
) -> jax.Array:
    """Return the slopes of C targets of each row, mean over the path, [C, S, N, D]."""
    stream, past = run.stream_BxTxX, split.past(run)[1]
    total_CxSxNxD: jax.Array | None = None
    # At the midpoints of equal parts of the path, or at its beginning.
    shares: list[np.float32 | None] = [np.float32((step + 0.5) / steps) for step in range(steps)]
    for share in shares or [None]:
        value_SxNxD = _replace_share(split.point, split.dictionary, run.value_BxTxD, sides, rows.tree, source, share)
        slope_CxSxNxD = target_slopes(split.point, split.params, past, stream, value_SxNxD, rows, targets_CxSxRx2)
        total_CxSxNxD = slope_CxSxNxD if total_CxSxNxD is None else total_CxSxNxD + slope_CxSxNxD
    assert total_CxSxNxD is not None
    return total_CxSxNxD / steps if steps else total_CxSxNxD


@functools.partial(jax.jit, static_argnums=0)
def _replace_share(
    point: SplitPoint,
    dictionary: Dictionary,
    value_BxTxD: jax.Array,
    sides: Sides,
    tree: SharedPrefixBatch,
    source: ActivationReplacement,
    share: jax.Array | None,
) -> jax.Array:
    """Return the site's value at the tokens of rows where a share of every activation is replaced, [S, N, D]."""
    value_SxNxD = tree.take(value_BxTxD)
    if share is not None:
        fall_SxNxF = share * _mean_fall(dictionary, sides, tree, source)
        W_dec_FxD = dictionary.W_dec_FxD[...].astype(fall_SxNxF.dtype)
        replaced_SxNxD = value_SxNxD.astype(fall_SxNxF.dtype) - matmul(fall_SxNxF, W_dec_FxD)
        value_SxNxD = replaced_SxNxD.astype(value_SxNxD.dtype)
    return jax.lax.with_sharding_constraint(value_SxNxD, row_sharding(point.mesh, value_SxNxD.shape))


def leaders(attribution_F: np.ndarray, top: int) -> list[int]:
    """Return the features of largest attribution, largest first: at most ``top``, only those above 0."""
    # Stable, so that the same ones of equal features lead on every machine.
    order_K = np.argsort(-attribution_F, kind="stable")[:top]
    return [int(feature) for feature in order_K if attribution_F[feature] > 0]


@functools.partial(jax.jit, static_argnums=0)
def target_slopes(
    point: SplitPoint,
    params: decoder.Params,
    past: PrefixKV,
    stream: jax.Array,
    value_SxNxD: jax.Array,
    rows: PromptTree,
    targets_CxSxRx2: jax.Array,
) -> jax.Array:
    """Return the slope of the difference of C targets of each row at the site, [C, S, N, D].

    At a token that rows share it is the sum over these rows. The layers above the site run forward once and backward
    once per target.

    Args:
      point: where the model is split (static).
      params: parameters of the decoder.
      past: keys and values of the clean run above the site.
      stream: the stream of the clean run that enters the layers above the site.
      value_SxNxD: the site's value at the tokens of the rows.
      rows: the rows.
      targets_CxSxRx2: token ids; of several readouts of the user the number of one, in the first column.
    """

    def run(value_SxNxD: jax.Array) -> Ends:
        return point.run_shared_ends(params, past, rows.tree, rows.tree.take(stream), value_SxNxD, rows.end_SxC)

    # One forward pass for all targets; only the pullback is mapped over them.
    ends, pullback = jax.vjp(run, value_SxNxD)
    last_X = rows.tree.last_positions(rows.end_SxC, point.positions)

    def difference(ends: Ends, target_SxRx2: jax.Array, measured: SplitPoint = point) -> jax.Array:
        # A row's slope belongs to its own tokens, so the gradient of the sum holds every token's sum over its rows.
        value_X = measured.readouts(params, ends, last_X, target_SxRx2.reshape(-1, 2))[:, 0]
        return jnp.where(rows.is_prompt_X, value_X, 0.0).sum()

    if point.readout and len(point.readout.functions) > 1:
        alone = [dataclasses.replace(point.readout, functions=(function,)) for function in point.readout.functions]
        points = [dataclasses.replace(point, readout=readout) for readout in alone]
        branches = [functools.partial(jax.grad(difference), measured=point) for point in points]
        # One function at a time: together they would take as many times the logits of the whole vocabulary.
        end_slopes = jax.lax.map(
            lambda target_SxRx2: jax.lax.switch(target_SxRx2[0, 0, 0], branches, ends, target_SxRx2), targets_CxSxRx2
        )
    else:
        end_slopes = jax.vmap(jax.grad(difference), in_axes=(None, 0))(ends, targets_CxSxRx2)
    slope_CxSxNxD = jax.vmap(lambda cotangent: pullback(cotangent)[0])(end_slopes)
    return jax.lax.with_sharding_constraint(slope_CxSxNxD, place_slopes(point.mesh, slope_CxSxNxD.shape))


def place_slopes(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Return where slopes [C, S, N, D] are: tokens over ``member`` and ``data``, vectors over ``model``."""
    return fitting_sharding(mesh, shape, None, BY_DOCUMENT, None, "model")


@functools.partial(jax.jit, static_argnums=0)
def score_slopes(
    point: SplitPoint,
    dictionary: Dictionary,
    sides: Sides,
    tree: SharedPrefixBatch,
    slope_CxSxNxD: jax.Array,
    source: ActivationReplacement,
) -> jax.Array:
    """Return the attribution of every feature for C targets, given their slopes: sums over prompts, [C, F].

    Args:
      point: where the model is split (static).
      dictionary: a dictionary of the site.
      sides: what the falls of its activations are computed from.
      tree: the tokens of the slopes.
      slope_CxSxNxD: from ``target_slopes``.
      source: what replaces activations.
    """
    removed_SxNxF = _mean_fall(dictionary, sides, tree, source)
    W_dec_FxD = dictionary.W_dec_FxD[...]

    def score(slope_SxNxD: jax.Array) -> jax.Array:
        return weighted(removed_SxNxF, slope_SxNxD, W_dec_FxD).sum(axis=0)

    # One target at a time: [C, S, N, F] would be large.
    return jax.lax.with_sharding_constraint(jax.lax.map(score, slope_CxSxNxD), sharding(point.mesh))


def _mean_fall(
    dictionary: Dictionary, sides: Sides, tree: SharedPrefixBatch, source: ActivationReplacement
) -> jax.Array:
    """Return by how much every activation falls, f - r, in the mean over draws of r, at the tokens: [S, N, F]."""
    read_SxNxD, domain_SxN = tree.take(sides.read_BxTxD), tree.take(sides.domain_BxT)
    f_SxNxF = active_features(dictionary, read_SxNxD, domain_SxN)
    if sides.counts is not None:
        return removed_on_average(f_SxNxF, *sides.counts)
    counterpart_SxNxF = f_SxNxF
    if sides.counterpart is not None:
        counterpart_SxNxF = active_features(dictionary, *(tree.take(array) for array in sides.counterpart))
    every_F = jnp.arange(f_SxNxF.shape[-1])
    # The number of prompts counts for random draws alone.
    return source.removed(f_SxNxF, counterpart_SxNxF, domain_SxN, every_F, jnp.int32(0))


def weighted(f_BxTxF: jax.Array, slope_BxTxD: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Return ``f_BxTxF`` x slope along each row of ``W_dec_FxD``, summed over positions: [B, F]."""
    # Not in the dtype of the rows, which may be bfloat16.
    along_BxTxF = matmul(slope_BxTxD.astype(f_BxTxF.dtype), W_dec_FxD.T)  # dL/df
    return (f_BxTxF * along_BxTxF).sum(axis=1)
