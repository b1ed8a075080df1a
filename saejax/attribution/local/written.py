"""What features of cross-layer transcoders write to the layers above their own."""

import jax
import numpy as np
from scipy.sparse import csr_array

from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.parallel.collectives import to_host

_AT_ONCE = 1 << 26  # numbers of directions that are in memory at once


class Written:
    """What features write to later layers, summed up while runs go through the layers; nothing of per-layer sets.

    Args:
      transcoders: the set.
      shape: of the runs' positions, such as (R, T).
    """

    def __init__(self, transcoders: LayerTranscoders, *shape: int):
        self._transcoders, self._shape = transcoders, shape
        self._above: dict[int, np.ndarray] = {}

    def add(self, layer: int, places: np.ndarray, features: np.ndarray, values: np.ndarray | jax.Array) -> None:
        """Adds what features of a layer write to those above it.

        Args:
          layer: theirs.
          places: where they are active, as places in the positions of all runs, one after the other.
          features, values: which they are, and their activations there, in the same shape.
        """
        above, width = self._transcoders.written_layers(layer) - 1, self._transcoders.configs[0].d_in
        if not above or not places.size:
            return
        features_U, index_E = np.unique(features.reshape(-1), return_inverse=True)
        entries = to_host(values).reshape(-1).astype(np.float32), (places.reshape(-1), index_E)
        acts_NxU = csr_array(entries, (int(np.prod(self._shape)), len(features_U))).tocsc()
        size = max(_AT_ONCE // (above * width), 1)
        for start in range(0, len(features_U), size):
            own = slice(start, start + size)
            writes_UxX = self._transcoders.writes(layer, features_U[own])[:, 1:].reshape(-1, above * width)
            sum_NxLxD = (acts_NxU[:, own] @ writes_UxX).reshape(-1, above, width)
            for number, sum_NxD in enumerate(np.moveaxis(sum_NxLxD, 1, 0)):
                known = self._above.get(layer + 1 + number, np.float32(0))
                self._above[layer + 1 + number] = known + sum_NxD

    def at(self, layer: int) -> np.ndarray | None:
        """What is written to a layer from below, fp32 [..., D], which is given up; None: nothing."""
        sum_NxD = self._above.pop(layer, None)
        return None if sum_NxD is None else sum_NxD.reshape(*self._shape, -1)
