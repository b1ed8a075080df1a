"""Activation patching: the value of a site at one position of one run, put into another run.

Two runs of as many tokens belong to a prompt: its own (clean) and that of its counterpart (corrupted), for which the
prompt's wrong answer is right. At every layer L and position t the site's value in the *base* run is replaced by that
of the *source* run (an interchange; Vig et al., 2020; Geiger et al., 2021), and what is read is the logit difference of
the prompt's own answers:

- *denoising*: base corrupted, source clean: what suffices to bring the answer back;
- *noising*: base clean, source corrupted: what the answer needs

(Heimersheim and Nanda, 2024, arXiv 2404.15255). One *row* of work is one (direction, layer, position, prompt). What
cannot matter is not computed:

- layers below L and tokens before t are those of the base run;
- a row in which both runs have the same value, to the last bit, is not run: its effect is exactly 0;
- of the vocabulary's logits, two are.

Rows of neighbouring layers go through one program together. It starts at their lowest layer, on the base run's stream;
a row of a higher layer follows the base run until it gets there.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from saejax.causal.patching.pairs import STEP, Pairs, group_pairs
from saejax.causal.patching.programs import Recorded, differing, record, run_rows
from saejax.errors import UserError
from saejax.interventions.engine import prefetch
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import by_row
from saejax.runner.parts import OnProgress, silent
from saejax.tasks.behaviours import Prompt

DIRECTIONS = ("denoising", "noising")
_PROGRAM = 2048  # tokens that run, on half of the layers, in the time in which another program is compiled, roughly


@dataclasses.dataclass(frozen=True)
class Patched:
    """Logit differences of P prompts with a kind of site patched at L layers; D counts ``DIRECTIONS``.

    Attributes:
      clean_P, corrupted_P: float64, of the prompts and of their counterparts.
      diff_DxLxPxC: float64, after the patch. Columns are aligned at the end: the last one is the last token of every
        prompt; NaN where a prompt has no such position.
      rows, all_rows: how many rows were run, and how many there are.
      work, all_work: tokens times layers that were run, padding included, and that whole runs of all rows would take.
    """

    clean_P: np.ndarray
    corrupted_P: np.ndarray
    diff_DxLxPxC: np.ndarray
    rows: int
    all_rows: int
    work: int
    all_work: int

    @property
    def effect_DxLxPxC(self) -> np.ndarray:
        """In logits: what denoising brings back, patched - corrupted; what noising takes away, clean - patched."""
        denoised_LxPxC, noised_LxPxC = self.diff_DxLxPxC
        restored_LxPxC = denoised_LxPxC - self.corrupted_P[None, :, None]
        return np.stack([restored_LxPxC, self.clean_P[None, :, None] - noised_LxPxC])


class PatchRows(NamedTuple):
    """Rows of work: the entry, the prompt (its place in the group) and the position of each."""

    entry_N: np.ndarray
    place_N: np.ndarray
    position_N: np.ndarray


def patch_sites(
    model: LanguageModel,
    kind: str,
    prompts: Sequence[Prompt],
    batch_rows: int = 64,
    on_progress: OnProgress = silent,
) -> Patched:
    """Patches a kind of site at every layer and position, in both directions.

    Args:
      kind: one of ``sites.KINDS``.
      prompts: with counterparts of as many tokens, at least one.
      batch_rows: as for ``ablation.ablate_sets``.
      on_progress: called at the start and after each batch with the rows done and of all; may raise to stop.

    Raises:
      UserError: a prompt is too long, or a logit difference is not finite.
    """
    site, layers = Site(kind, 0), model.config.n_layers
    point = SplitPoint(model.config, site, site, model.mesh)
    groups = group_pairs(model, point, prompts)
    ends_P = np.concatenate([pairs.ends_P for pairs in groups])
    columns, total = int(ends_P.max()), 2 * layers * int(ends_P.sum())
    base_2xP = np.full((2, len(prompts)), np.nan)
    diff_DxLxPxC = np.full((2, layers, len(prompts), columns), np.nan)
    rows = done = work = 0
    on_progress(done, total)
    for pairs in groups:
        sides = (by_row(point.mesh, ids_BxT, pairs.last_B, pairs.answers_Bx2) for ids_BxT in pairs.ids_2xBxT)
        runs = [record(point, model.params, *rows) for rows in sides]
        base_2xP[:, pairs.index_P] = own_2xP = np.stack(
            [_read(run.diff_B, point)[: len(pairs.index_P)] for run in runs]
        )
        own_DxLxPxT = np.zeros((2, layers, 1, pairs.ids_2xBxT.shape[2])) + own_2xP[::-1, None, :, None]
        found = _found(point, pairs, runs)
        done += 2 * (layers * int(pairs.ends_P.sum()) - len(found.entry_N))
        for direction, part, device_diff_R, cost in prefetch(
            _dispatched(point, model.params, pairs, runs, found, batch_rows)
        ):
            layer_N, place_N, position_N = (
                found.entry_N[part] - _shift(point),
                found.place_N[part],
                found.position_N[part],
            )
            own_DxLxPxT[direction, layer_N, place_N, position_N] = _read(device_diff_R, point)[: len(part)]
            rows, done, work = rows + len(part), done + len(part), work + cost
            on_progress(done, total)
        for place, (index, end) in enumerate(zip(pairs.index_P, pairs.ends_P, strict=True)):
            diff_DxLxPxC[:, :, index, columns - end :] = own_DxLxPxT[:, :, place, :end]
    clean_P, corrupted_P = base_2xP
    return Patched(clean_P, corrupted_P, diff_DxLxPxC, rows, total, work, 2 * layers**2 * int((ends_P**2).sum()))


def _shift(point: SplitPoint) -> int:
    """The entry of a patch is its layer; what leaves a layer is patched where it enters the next one."""
    return int(point.site.kind == "resid_post")


def _found(point: SplitPoint, pairs: Pairs, runs: Sequence[Recorded]) -> PatchRows:
    """The rows to run in each direction, by rising layer: those in which the two runs differ."""
    count, length = len(pairs.index_P), pairs.ids_2xBxT.shape[2]
    real_PxT = np.arange(length)[None, :] < pairs.ends_P[:, None]
    entries = slice(_shift(point), _shift(point) + point.config.n_layers)
    differs_LxPxT = np.asarray(differing(point, *(run.patches for run in runs)))[entries, :count]
    layer_N, place_N, position_N = (index_N.astype(np.int32) for index_N in np.nonzero(differs_LxPxT & real_PxT[None]))
    return PatchRows(layer_N + np.int32(_shift(point)), place_N, position_N)


def _dispatched(
    point: SplitPoint,
    params: decoder.Params,
    pairs: Pairs,
    runs: Sequence[Recorded],
    found: PatchRows,
    batch_rows: int,
) -> Iterator[tuple[int, np.ndarray, jax.Array, int]]:
    """Starts all rows; yields direction, rows, their logit differences, and tokens times layers of each batch."""
    layers, needed_N = point.config.n_layers, pairs.last_B[found.place_N] - found.position_N + 1
    most = batch_rows * pairs.ids_2xBxT.shape[2]
    batches = even_batches(needed_N, most, STEP, _PROGRAM) if len(needed_N) else []
    for direction, (base, source) in enumerate(((1, 0), (0, 1))):
        for part, size, length in batches:
            entry_R, place_R, position_R = (array_N[np.resize(part, size)] for array_N in found)
            start, last_R, answers_Rx2 = entry_R.min(), pairs.last_B[place_R], pairs.answers_Bx2[place_R]
            first_R = np.maximum(last_R - length + 1, 0)
            rows = by_row(point.mesh, entry_R, place_R, position_R, first_R, last_R, answers_Rx2)
            diff_R = run_rows(point, length, params, runs[base], runs[source].patches, start, *rows)
            yield direction, part, diff_R, size * length * (layers - int(start))


def _read(diff_R: jax.Array, point: SplitPoint) -> np.ndarray:
    """Logit differences in float64, which must be finite."""
    read_R = np.asarray(diff_R, np.float64)
    if not np.isfinite(read_R).all():
        raise UserError(
            f"a logit difference with {point.site.kind} patched is not finite: the model's weights hold NaN or it "
            "overflows; try --model.dtype=float32 or another model"
        )
    return read_R
