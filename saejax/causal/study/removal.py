"""A benchmark's items without single features: what each top feature and each matched random one costs by itself.

Removing a feature leaves everything below the dictionary's site as it is, and most texts altogether: what is run are
the layers above, on the texts where the feature fires.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.study.items import ItemScores
from saejax.causal.study.references import Reference, ReferenceBatch, References
from saejax.causal.study.results import ChosenFeatures, SingleEffects
from saejax.causal.study.single import judge_single
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.resume import Chunks
from saejax.interventions.split_model import SplitModel, active_features
from saejax.models import decoder
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.settings import StudyConfig
from saejax.tasks.benchmark_definitions import Item
from saejax.tasks.likelihood import token_scores

FEATURES = 16  # removed between two looks whether to stop
_NOT_RUN = 1.0  # where a feature does not fire; no log-likelihood is above 0


def measure_single(
    split: SplitModel,
    scores: ItemScores,
    test: Sequence[Item],
    chosen: ChosenFeatures,
    config: StudyConfig,
    accuracy: bool,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SingleEffects | None:
    """What each top feature that fires on the test items is worth there by itself; None if none does.

    Args:
      test: items that judge.
      chosen: the top features and their draws.
      accuracy: whether the items' choices are compared, too.
      folder: where measurements are kept, so that a run that was killed goes on.
      on_progress: called with the removals done and of all; may raise to stop.

    Raises:
      UserError: something is not finite.
    """
    top = [entry.feature for entry in chosen.top if entry.firing_rate > 0]
    if not top:
        return None
    features = sorted({*top, *(feature for draw in chosen.controls for feature in draw)})
    references, right_N = _references(scores, test, accuracy)
    made = References(split, references, config.batch_tokens)
    clean_R, without_KxR = log_likelihoods(split, made, len(references), features, folder, on_progress)
    tokens_N = np.array([len(references[place].answer) for place in right_N])
    drop_KxN = (clean_R - without_KxR)[:, right_N] / tokens_N
    lost_KxN = None
    if accuracy:
        items_R = np.array([reference.item for reference in references])
        lost_KxN = _right(clean_R[None], items_R, right_N) - _right(without_KxR, items_R, right_N)
    return judge_single(top, features, np.array(chosen.controls), drop_KxN, lost_KxN, config)


def _references(scores: ItemScores, test: Sequence[Item], accuracy: bool) -> tuple[list[Reference], np.ndarray]:
    """The answers to score, and which of them is each item's reference."""
    if not accuracy:
        return scores.solutions(test), np.arange(len(test))
    found = [
        (scores.reference(place, item, choice), choice == item.answer)
        for place, item in enumerate(test)
        for choice in item.choices
    ]
    return [reference for reference, _ in found], np.flatnonzero([right for _, right in found])


def _right(scores_SxR: np.ndarray, items_R: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """1.0 where an item's right choice is its likeliest, [S, N]; of equals the first counts, as in ``_choose``."""
    columns = [np.flatnonzero(items_R == item) for item in range(len(right_N))]
    return np.stack(
        [own[scores_SxR[:, own].argmax(axis=1)] == right for own, right in zip(columns, right_N, strict=True)], axis=1
    ).astype(np.float64)


def log_likelihoods(
    split: SplitModel,
    references: References,
    count: int,
    features: Sequence[int],
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The log-likelihood of each reference as the model is [R], and without each feature by itself [K, R], in nats.

    Args:
      references: ``count`` of them, R.
      features: K distinct ones.
      folder: where what was measured is kept; None: nowhere.
      on_progress: called with the removals done and of all; may raise to stop.

    Raises:
      UserError: something is not finite.
    """
    columns = [None, *features]  # None: nothing is removed
    parts = [columns[first : first + FEATURES] for first in range(0, len(columns), FEATURES)]
    planned = references.planned()
    shapes = [(len(part), len(places_N)) for places_N, *_ in planned for part in parts]
    plan = (np.array([*places_N, *rest, *features]) for places_N, *rest in planned)
    total = sum(map(math.prod, shapes))
    with Chunks(folder, shapes, plan) as chunks:
        for number, one in enumerate(planned):
            left = parts[max(len(chunks.values) - number * len(parts), 0) :]
            if left:
                batch = references.batch(*one)
            for part in left:
                on_progress(sum(values.size for values in chunks.values), total)
                chunks.add(_part(split, batch, len(one[0]), part))
    found_ExR = np.full((len(columns), count), np.nan)
    for number, (places_N, *_) in enumerate(planned):
        own = chunks.values[number * len(parts) : (number + 1) * len(parts)]
        found_ExR[:, places_N] = np.concatenate(own)
    if not np.isfinite(found_ExR).all():
        raise UserError(
            "log-likelihoods without single features are not finite: the model or the dictionary holds NaN or "
            "overflows; try --model.dtype=float32, or train the dictionary again"
        )
    clean_R, changed_KxR = found_ExR[0], found_ExR[1:]
    return clean_R, np.where(changed_KxR == _NOT_RUN, clean_R, changed_KxR)


def _part(split: SplitModel, batch: ReferenceBatch, count: int, part: Sequence[int | None]) -> np.ndarray:
    """Log-likelihoods of a batch's first references without each of some features, fp32 [M, N]; see ``_NOT_RUN``."""
    rows = len(batch.domain_BxT)
    features_K = np.resize([feature or 0 for feature in part], FEATURES).astype(np.int32)
    on_K = np.resize([feature is not None for feature in part], FEATURES)
    f_BxTxK = activations(split.point, split.dictionary, features_K, on_K, batch.read_BxTxD, batch.domain_BxT)
    fires_MxN = np.asarray((f_BxTxK != 0).any(axis=1)).T[: len(part), :count]
    asked_MxN = fires_MxN | np.array([feature is None for feature in part])[:, None]
    found_MxN = np.full(asked_MxN.shape, _NOT_RUN, np.float32)
    place_E, row_E = np.nonzero(asked_MxN)
    for first in range(0, len(row_E), rows):
        own = slice(first, first + rows)
        some_B, which_B = np.resize(row_E[own], rows), np.resize(place_E[own], rows)
        removed = f_BxTxK, features_K, some_B, which_B
        total_B = without(split.point, split.params, split.dictionary, batch, *removed)
        found_MxN[place_E[own], row_E[own]] = np.asarray(total_B)[: len(row_E[own])]
    return found_MxN


@functools.partial(jax.jit, static_argnums=0)
def activations(
    point: SplitPoint,
    dictionary: Dictionary,
    features_K: jax.Array,
    on_K: jax.Array,
    read_BxTxD: jax.Array,
    domain_BxT: jax.Array,
) -> jax.Array:
    """Activations [B, T, K] of some ``features``, those that are ``on``; ``read`` and ``domain`` as in a batch."""
    f_BxTxK = active_features(dictionary, read_BxTxD, domain_BxT)[..., features_K] * on_K[None, None, :]
    return jax.lax.with_sharding_constraint(f_BxTxK, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def without(
    point: SplitPoint,
    params: decoder.Params,
    dictionary: Dictionary,
    batch: ReferenceBatch,
    f_BxTxK: jax.Array,
    features_K: jax.Array,
    some_R: jax.Array,
    which_R: jax.Array,
) -> jax.Array:
    """The weighted log-likelihood of rows ``some`` of a batch, each without the one ``which`` of K features, [R].

    Args:
      f_BxTxK: from ``activations``.
      features_K: the features.
      some_R, which_R: the row, and the place of the feature.
    """
    W_dec_KxD = dictionary.W_dec_FxD[...][features_K]
    removed_RxT = jnp.take_along_axis(f_BxTxK[some_R], which_R[:, None, None], axis=2)[..., 0]
    rows = ReferenceBatch(*(array[some_R] for array in batch))
    changed_RxTxD = removed_RxT[..., None] * W_dec_KxD[which_R][:, None, :]
    value_RxTxD = rows.value_BxTxD
    edited_RxTxD = (value_RxTxD.astype(changed_RxTxD.dtype) - changed_RxTxD).astype(value_RxTxD.dtype)
    x_RxTxD = point.run_suffix(params, rows.stream_BxTxD, edited_RxTxD)
    logp_RxC, _ = token_scores(point.config, params, x_RxTxD, rows.positions_BxC, rows.targets_BxC)
    total_R = (rows.weight_BxC * logp_RxC).sum(axis=1)
    return jax.lax.with_sharding_constraint(total_R, sharding(point.mesh))
