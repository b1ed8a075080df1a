"""Scores of a crosscoder at each part: explained variance, losses of the part's model, private and shared features.

The values of all parts are read in clean passes of their models; then each part alone is replaced in its model, and
where a model has several parts all of them at once. All parts of a residual stream at once are no more than the last:
layers after it read nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import is_not_sink, join, split, unjoin
from saejax.dictionaries.losses import explained_share
from saejax.evaluation.loss_recovered import (
    Losses,
    LossSums,
    count_groups,
    count_predicted,
    grouped_batches,
    stand_in_losses,
)
from saejax.models.edits import Positions, SiteEdit, Values
from saejax.models.language_model import LanguageModel, forward
from saejax.models.sites import OtherSite, Site, decoder_site, site_parts
from saejax.parallel.mesh import by_filled_row
from saejax.progress import OnProgress, silent

PRIVATE, SHARED = 0.9, (0.4, 0.6)  # relative norms, as in Minder et al. (2025)
BINS = 20


class Parts(NamedTuple):
    """The parts of a joined site that are of one model, by name."""

    lm: LanguageModel
    sites: dict[str, Site]


def parts_by_model(site: str, lm: LanguageModel, second: LanguageModel | None) -> list[Parts]:
    """Return the parts of a joined site, by the models that they are of; the first model first.

    Raises:
      UserError: a site does not exist in its model.
    """
    parts = []
    for model, of_other in ((lm, False), (second, True)):
        names = [name for name in site_parts(site) if OtherSite.names(name) == of_other]
        if model is not None and names:
            parts.append(Parts(model, {name: decoder_site(name).check(model.config) for name in names}))
    return parts


def clean_values(models: Sequence[Parts], ids_BxT: jax.Array, lengths_B: jax.Array) -> dict[str, jax.Array]:
    """Return the values [B, T, width] at all parts, by name.

    Args:
      models: the result of ``parts_by_model``.
      ids_BxT: token ids, padded on the right.
      lengths_B: number of tokens of each text.
    """
    by_part: dict[str, jax.Array] = {}
    for lm, sites in models:
        _, values = forward(lm.config, tuple(sites.values()), False, lm.params, ids_BxT, lengths_B)
        by_part |= dict(zip(sites, values, strict=True))
    return by_part


def replaced(sites: Mapping[str, Site], new: Mapping[str, jax.Array]) -> tuple[SiteEdit, ...]:
    """Return edits that replace a model's values by these, [B, T, width], by part."""
    everywhere = Positions.parse("all")
    return tuple(SiteEdit(jnp.float32(0), Values(new[name], True), everywhere, site) for name, site in sites.items())


def part_losses(
    models: Sequence[Parts],
    dictionaries: Sequence[Dictionary],
    documents: Sequence[np.ndarray],
    mean_D: np.ndarray,
    batch_tokens: int = 4096,
    groups: Sequence[np.ndarray] = (),
    on_progress: OnProgress = silent,
) -> list[dict[str, Losses]]:
    """Return each crosscoder's losses with each part replaced, and with all of a model's (their names joined by "+").

    Args:
      models: the result of ``parts_by_model``.
      dictionaries: crosscoders of one joined site and one scale.
      documents: token ids.
      mean_D: mean of the joined values over training tokens.
      batch_tokens: tokens per program, padding included.
      groups: for each document the group of each token, see ``grouped_batches``.
      on_progress: called with the tokens that are scored and all.
    """
    config = dictionaries[0].config
    total = count_predicted(documents)
    replaced_at = {"+".join(sites): (lm, sites) for lm, sites in models}
    replaced_at |= {name: (lm, {name: site}) for lm, sites in models for name, site in sites.items()}
    sums = {name: LossSums(len(dictionaries), count_groups(groups)) for name in replaced_at}
    for batch, group_BxT in grouped_batches(models[0].lm, documents, groups, batch_tokens):
        ids_BxT, lengths_B, _ = batch
        clean = clean_values(models, ids_BxT, lengths_B)
        x_BxTxD = join(config, clean)
        # Kept at sinks, as in every edit: a value there changes the whole prompt.
        inside_BxTx1 = is_not_sink(config, x_BxTxD)[..., None]
        stand_ins = [jnp.broadcast_to(mean_D.astype(np.float32), x_BxTxD.shape), jnp.zeros_like(x_BxTxD)]
        stand_ins += [dictionary(x_BxTxD) for dictionary in dictionaries]
        new = [unjoin(config, jnp.where(inside_BxTx1, each_BxTxD, x_BxTxD)) for each_BxTxD in stand_ins]
        for name, (lm, sites) in replaced_at.items():
            # Not the logits of whole documents: ``compare`` makes the logits of a few positions at a time.
            last = (Site("resid_post", lm.config.n_layers - 1),)
            edits = [(), *(replaced(sites, value) for value in new)]
            left = [forward(lm.config, last, False, lm.params, ids_BxT, lengths_B, edit)[1][0] for edit in edits]
            sums[name].add(lm, left, *batch, group_BxT)
        on_progress(next(iter(sums.values())).tokens, total)
    by_place = [summed.losses() for summed in sums.values()]
    return [dict(zip(replaced_at, of_dictionary, strict=True)) for of_dictionary in zip(*by_place, strict=True)]


def target_losses(
    lm: LanguageModel,
    dictionaries: Sequence[Dictionary],
    documents: Sequence[np.ndarray],
    mean_D: np.ndarray,
    on_progress: OnProgress = silent,
    second: LanguageModel | None = None,
) -> list[Losses]:
    """Return the losses with each dictionary in place of its target, or of all parts of a crosscoder in the model.

    Args:
      lm: the model.
      dictionaries: of one site and one target.
      documents: token ids.
      mean_D: mean of the target over training tokens.
      on_progress: called with the tokens that are scored and all.
      second: the model of the parts ``other:...`` of crosscoders of two models.
    """
    site = dictionaries[0].site
    if not dictionaries[0].config.widths:
        return stand_in_losses(lm, dictionaries, documents, mean_D, on_progress=on_progress)
    models = parts_by_model(site, lm, second)
    by_part = part_losses(models, dictionaries, documents, mean_D, on_progress=on_progress)
    return [losses["+".join(models[0].sites)] for losses in by_part]


def part_variances(dictionaries: Sequence[Dictionary], blocks: Iterable[Sequence[np.ndarray]]) -> list[list[float]]:
    """Return the explained variance of each part, for each crosscoder, sums in fp64; 0 where a part does not vary.

    Args:
      dictionaries: crosscoders of one joined site.
      blocks: joined values, ([n, D],) each.
    """
    widths = dictionaries[0].config.widths
    errors = [np.zeros(len(widths)) for _ in dictionaries]
    tokens, total, square = 0, [np.zeros(width) for width in widths], np.zeros(len(widths))
    for x_NxD, *_ in blocks:
        parts = split(np.asarray(x_NxD, np.float64), widths)
        tokens += len(x_NxD)
        square += [np.square(part).sum() for part in parts]
        total = [sum_D + part.sum(0) for sum_D, part in zip(total, parts, strict=True)]
        for error, dictionary in zip(errors, dictionaries, strict=True):
            # Rounded to fp32 by the program, as the model would get it; sums are taken in fp64 afterwards.
            placed_BxD = by_filled_row(dictionary.mesh, x_NxD) if dictionary.mesh else x_NxD
            outputs = split(np.asarray(_reconstruction(dictionary, placed_BxD), np.float64)[: len(x_NxD)], widths)
            error += [np.square(part - output).sum() for part, output in zip(parts, outputs, strict=True)]
    variance = square - [np.square(sum_D).sum() / max(tokens, 1) for sum_D in total]
    return [explained_share(error, variance, square).tolist() for error in errors]


@jax.jit
def _reconstruction(dictionary: Dictionary, x_NxD: jax.Array) -> jax.Array:
    return dictionary(x_NxD)


# Norms of decoder rows by part: private and shared features.


def relative_norms(norm_PxF: np.ndarray) -> np.ndarray:
    """Return how much longer a feature's decoder row is in each part than in all others.

        relative_p = (1 + (|d_p| - max_q |d_q|) / max(|d_p|, max_q |d_q|)) / 2,    q all other parts

    With two parts this is the relative norm of Minder et al. (arXiv 2504.02922): 1 is this part alone, 0.5 equally
    long in both, 0 the other part alone.

    Args:
      norm_PxF: norms of the rows in each part, of scaled values; at least two parts.

    Returns:
      Relative norms [P, F], 0 to 1; 0.5 for a feature whose row is zero.
    """
    relative = []
    for part, norm_F in enumerate(norm_PxF):
        largest_other_F = np.delete(norm_PxF, part, axis=0).max(axis=0)
        larger_F = np.maximum(norm_F, largest_other_F)
        relative.append((1 + (norm_F - largest_other_F) / np.where(larger_F > 0, larger_F, 1.0)) / 2)
    return np.stack(relative)


def private_part(relative_PxF: np.ndarray) -> np.ndarray:
    """Return the part that each feature is private to, int [F]: its relative norm exceeds 0.9 there; -1: to none."""
    return np.where(relative_PxF.max(axis=0) > PRIVATE, relative_PxF.argmax(axis=0), -1)


def is_shared(relative_PxF: np.ndarray) -> np.ndarray:
    """Return whether a feature's rows are about equally long in the two parts where they are longest, bool [F]."""
    largest_F = relative_PxF.max(axis=0)
    return (largest_F >= SHARED[0]) & (largest_F <= SHARED[1])


def histogram(relative_F: np.ndarray) -> tuple[int, ...]:
    """Return counts of relative norms in 20 equal bins from 0 to 1."""
    return tuple(np.histogram(relative_F, BINS, (0, 1))[0].tolist())
