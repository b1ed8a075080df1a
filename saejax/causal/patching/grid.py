"""What patching does at every place: layer, position and direction, over prompts, in logits and normalised.

The normalised effect is the ratio of two means over the same prompts, effect / (clean - corrupted): 0 where patching
changes nothing, 1 where it does as much as replacing the whole prompt. Where clean - corrupted is not clearly above 0,
there is nothing to divide by and no normalised effect.
"""

import dataclasses

import numpy as np

from saejax.causal.clustered import Resampling
from saejax.causal.patching.results import StrongestPatch
from saejax.causal.patching.sites import DIRECTIONS, Patched
from saejax.interventions.columns import Columns
from saejax.results import Interval
from saejax.tasks.scoring import interval_ends

_EFFECT, _SHARE = ("effect", "effect_low", "effect_high"), ("normalised", "low", "high")


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

    kind = "patching"

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

    def strongest(self, train: Patched) -> dict[str, StrongestPatch]:
        """Of each direction the place of largest mean effect on train prompts, with what it does on these ones.

        The largest of many effects is large by chance, too: on the prompts that chose it, it would seem larger than it
        is.

        Args:
          train: the same kind of site, patched on train prompts.
        """
        found, columns = {}, self.grid("effect").shape[2]
        for d, direction in enumerate(DIRECTIONS):
            effect_LxPxC = train.effect_DxLxPxC[d, :, :, -columns:]
            has_PxC = ~np.isnan(effect_LxPxC[0])
            mean_LxC = np.nansum(effect_LxPxC, axis=1) / np.maximum(has_PxC.sum(axis=0), 1)
            mean_LxC[:, ~has_PxC.any(axis=0)] = -np.inf
            layer, column = np.unravel_index(np.argmax(mean_LxC), mean_LxC.shape)
            position = int(column) - mean_LxC.shape[1]
            (place,) = np.flatnonzero(
                (self.direction == direction) & (self.layer == layer) & (self.position == position)
            )
            normalised = Interval(*(float(getattr(self, name)[place]) for name in _SHARE))
            found[direction] = StrongestPatch(
                layer=int(layer),
                position=position,
                train_effect=float(mean_LxC[layer, column]),
                effect=Interval(*(float(getattr(self, name)[place]) for name in _EFFECT)),
                normalised=None if np.isnan(normalised.mean) else normalised,
            )
        return found


def measurable(clean_P: np.ndarray, corrupted_P: np.ndarray, resampling: Resampling) -> bool:
    """Whether clean - corrupted is above 0 with its whole 95 % interval."""
    return resampling.mean(clean_P - corrupted_P).low > 0


def make_grid(patched: Patched, resampling: Resampling) -> PatchingGrid:
    """The grid of patched sites.

    Args:
      patched: of one behaviour.
    """
    effect_DxLxPxC, whole_P = patched.effect_DxLxPxC, patched.clean_P - patched.corrupted_P
    directions, layers, _, columns = effect_DxLxPxC.shape
    has_whole = measurable(patched.clean_P, patched.corrupted_P, resampling)
    found_7xDxLxC = np.full((7, directions, layers, columns), np.nan)
    for column in range(columns):
        own_P = ~np.isnan(effect_DxLxPxC[0, 0, :, column])
        own = resampling.among(own_P)
        effect_NxQ = effect_DxLxPxC[:, :, own_P, column].reshape(-1, own_P.sum())
        rows = [effect_NxQ.mean(axis=1), *interval_ends(effect_NxQ, own.share_RxP)]
        if has_whole and own.mean(whole_P[own_P]).low > 0:
            ends = interval_ends(effect_NxQ, own.share_RxP, whole_P[own_P])
            rows += [rows[0] / whole_P[own_P].mean(), *ends]
        found_7xDxLxC[: len(rows), :, :, column] = np.reshape(rows, (len(rows), directions, layers))
        found_7xDxLxC[6, :, :, column] = own_P.sum()
    direction_N, layer_N, column_N = (index.ravel() for index in np.indices((directions, layers, columns)))
    return PatchingGrid(
        direction=np.array(DIRECTIONS, object)[direction_N],
        layer=layer_N,
        position=column_N - columns,
        prompts=found_7xDxLxC[6].ravel().astype(np.int64),
        **{name: values.ravel() for name, values in zip((*_EFFECT, *_SHARE), found_7xDxLxC[:6], strict=True)},
    )
