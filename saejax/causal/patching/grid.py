"""What patching does at every place: layer, position and direction, over prompts, in logits and normalised.

The normalised effect is the ratio of two means over the same prompts, effect / (clean - corrupted): 0 where patching
changes nothing, 1 where it does as much as replacing the whole prompt. Where clean - corrupted is not clearly above 0,
there is nothing to divide by and no normalised effect.
"""

import dataclasses
from pathlib import Path

import numpy as np

from saejax.causal.columns import Columns
from saejax.causal.patching.results import StrongestPatch
from saejax.causal.patching.sites import DIRECTIONS, Patched
from saejax.tasks.scoring import bootstrap_mean, bootstrap_means


@dataclasses.dataclass(frozen=True)
class PatchingGrid(Columns):
    """The places of a behaviour; arrays [N], sorted by direction, layer and position.

    Attributes:
      direction: one of ``patching.DIRECTIONS``.
      layer: counted from 0.
      position: from the end, -1 is the last token.
      effect, effect_low, effect_high: mean over the prompts, in logits, and its 95 % bootstrap interval.
      normalised, low, high: the same of the normalised effect; NaN where there is none, null in the file.
      prompts: how many have a token there.
    """

    direction: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    effect: np.ndarray
    effect_low: np.ndarray
    effect_high: np.ndarray
    normalised: np.ndarray
    low: np.ndarray
    high: np.ndarray
    prompts: np.ndarray

    def grid(self, name: str) -> np.ndarray:
        """One of the attributes as [D, L, C]."""
        columns = len(np.unique(self.position))
        return getattr(self, name).reshape(len(DIRECTIONS), -1, columns)

    def strongest(self) -> dict[str, StrongestPatch]:
        """Of each direction the place of largest effect."""
        found = {}
        for direction in DIRECTIONS:
            own_N = np.flatnonzero(self.direction == direction)
            best = own_N[np.argmax(self.effect[own_N])]
            normalised = float(self.normalised[best])
            found[direction] = StrongestPatch(
                layer=int(self.layer[best]),
                position=int(self.position[best]),
                effect=float(self.effect[best]),
                normalised=None if np.isnan(normalised) else normalised,
            )
        return found


def grid_file(folder: Path, behaviour: str) -> Path:
    """Where the patch stage keeps a behaviour's table."""
    return folder / f"{behaviour}-patching.parquet"


def measurable(clean_P: np.ndarray, corrupted_P: np.ndarray, resamples: int, seed: int) -> bool:
    """Whether clean - corrupted is above 0 with its whole 95 % interval."""
    return bootstrap_mean(clean_P - corrupted_P, resamples, seed).low > 0


def make_grid(patched: Patched, resamples: int, seed: int) -> PatchingGrid:
    """The grid of patched sites.

    Args:
      patched: of one behaviour.
      resamples: of the bootstrap.
      seed: likewise.
    """
    effect_DxLxPxC, whole_P = patched.effect_DxLxPxC, patched.clean_P - patched.corrupted_P
    directions, layers, _, columns = effect_DxLxPxC.shape
    has_whole = measurable(patched.clean_P, patched.corrupted_P, resamples, seed)
    found_7xDxLxC = np.full((7, directions, layers, columns), np.nan)
    for column in range(columns):
        own_P = ~np.isnan(effect_DxLxPxC[0, 0, :, column])
        effect_NxP = effect_DxLxPxC[:, :, own_P, column].reshape(-1, own_P.sum())
        rows = [effect_NxP.mean(axis=1), *bootstrap_means(effect_NxP, resamples, seed)]
        if has_whole and bootstrap_mean(whole_P[own_P], resamples, seed).low > 0:
            ends = bootstrap_means(effect_NxP, resamples, seed, whole_P[own_P])
            rows += [rows[0] / whole_P[own_P].mean(), *ends]
        found_7xDxLxC[: len(rows), :, :, column] = np.reshape(rows, (len(rows), directions, layers))
        found_7xDxLxC[6, :, :, column] = own_P.sum()
    direction_N, layer_N, column_N = (index.ravel() for index in np.indices((directions, layers, columns)))
    names = ("effect", "effect_low", "effect_high", "normalised", "low", "high")
    return PatchingGrid(
        direction=np.array(DIRECTIONS, object)[direction_N],
        layer=layer_N,
        position=column_N - columns,
        prompts=found_7xDxLxC[6].ravel().astype(np.int64),
        **{name: values.ravel() for name, values in zip(names, found_7xDxLxC[:6], strict=True)},
    )
