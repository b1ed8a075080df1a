"""Sum what features write to the outputs of MLPs, reading only the decoder rows that are in use."""

import jax
import numpy as np
from scipy.sparse import csr_array

from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.parallel.collectives import to_host

_AT_ONCE = 1 << 26  # numbers of decoder rows that are in memory at once


class FeatureOutputs:
    """The outputs of features to their own layer and, in cross-layer transcoders, to later ones.

    Sums are made as runs go up through the layers: ``add`` a layer's features, then ``pop`` its sum.

    Args:
      transcoders: the set.
      shape: of the runs' positions, such as (R, T).
    """

    def __init__(self, transcoders: LayerTranscoders, *shape: int):
        self._transcoders, self._shape = transcoders, shape
        self._sums: dict[int, np.ndarray] = {}

    def add(self, layer: int, places: np.ndarray, features: np.ndarray, values: np.ndarray | jax.Array) -> None:
        """Add what features of a layer write.

        Args:
          layer: of the features.
          places: flat indices into ``shape``, where the features are active.
          features: indices of the features, in the same shape.
          values: their activations, in the same shape.
        """
        if not places.size:
            return
        written, width = self._transcoders.written_layers(layer), self._transcoders.configs[0].d_in
        # A decoder row is read once, however many positions its feature is active at.
        features_U, index_E = np.unique(features.reshape(-1), return_inverse=True)
        entries = to_host(values).reshape(-1).astype(np.float32), (places.reshape(-1), index_E.reshape(-1))
        # By columns, as features are cut into parts below.
        acts_NxU = csr_array(entries, (int(np.prod(self._shape)), len(features_U))).tocsc()
        size = max(_AT_ONCE // (written * width), 1)
        for start in range(0, len(features_U), size):
            chunk = slice(start, start + size)
            writes_UxX = self._transcoders.writes(layer, features_U[chunk]).reshape(-1, written * width)
            sum_NxLxD = (acts_NxU[:, chunk] @ writes_UxX).reshape(-1, written, width)
            for above, sum_NxD in enumerate(np.moveaxis(sum_NxLxD, 1, 0)):
                self._sums[layer + above] = self._sums.get(layer + above, np.float32(0)) + sum_NxD

    def pop(self, layer: int) -> np.ndarray | None:
        """Return what was written to a layer, fp32 [..., D], and forget it; None: nothing was."""
        sum_NxD = self._sums.pop(layer, None)
        return None if sum_NxD is None else sum_NxD.reshape(*self._shape, -1)
