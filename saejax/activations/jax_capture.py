"""The JAX backend of capture: our decoder, on the mesh, up to the last site that is wanted."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from saejax.activations.plan import Batch, Take
from saejax.models.config import DecoderConfig
from saejax.models.language_model import forward
from saejax.models.loading import load_model
from saejax.models.parity import needs_check
from saejax.models.sites import AnySite, Site
from saejax.models.source import ModelSource
from saejax.models.weights import load_params
from saejax.parallel.mesh import BY_DOCUMENT, everywhere


class DecoderReader:
    """A reader that runs a model up to the last of some sites and hands over the value at each.

    Batches are padded to few shapes, each of which is compiled once. While the host stores one batch, the devices run
    the next. Nothing is computed, and no layer's parameters are read, after the last site.

    Args:
      source: the model's files.
      config: configuration of the whole model.
      sites: what to read, at least one.
      mesh: the devices; documents are split over ``member`` and ``data``, heads and MLP over ``model``.
      dtype: "float32" or "bfloat16", of parameters and products.
      hand_over: dtype of the values that are handed over.

    Attributes:
      config, mesh: as given.
      widths: width of the values at every site.
      params: parameters of ``parameters.parameter_table``, with only the layers that are needed.
    """

    def __init__(
        self,
        source: ModelSource,
        config: DecoderConfig,
        sites: Sequence[Site],
        mesh: Mesh,
        dtype: str,
        hand_over: str,
    ):
        self.config, self._sites, self.mesh, self._hand_over = config, tuple(sites), mesh, hand_over
        self.widths: dict[AnySite, int] = {site: site.width(config) for site in sites}
        if needs_check(source, dtype):
            load_model(source.name, source.revision or "main", dtype, mesh)  # which compares it with transformers
        self.params = load_params(source.folder, config, mesh, dtype, layers=1 + max(site.layer for site in sites))

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """See ``plan.Reader``."""
        running: tuple[Batch, Sequence[jax.Array]] | None = None
        for batch in batches:
            started = batch, self._start(batch)
            self._give(running, take)
            running = started
        self._give(running, take)

    def pad_batch(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids [B, T] and lengths [B] of a batch in its shape, whose rows the mesh divides."""
        extra, longer = np.subtract(batch.shape, batch.ids_BxT.shape)
        ids_BxT = np.pad(batch.ids_BxT, ((0, extra), (0, longer)))
        return ids_BxT, np.pad(batch.stop_B, (0, extra), constant_values=1).astype(np.int32)

    def close(self) -> None:
        """Give back the devices' memory; the reader cannot be used afterwards."""
        self.params = {}

    def _start(self, batch: Batch) -> Sequence[jax.Array]:
        """Send a batch to the devices, without waiting for it."""
        placed = [everywhere(self.mesh, array, BY_DOCUMENT) for array in self.pad_batch(batch)]
        _, values = forward(self.config, self._sites, False, self.params, *placed)
        # On the devices: values for a store in bfloat16 then take half the bytes on their way to the host.
        return jax.tree.map(lambda value: value.astype(self._hand_over), values)

    def _give(self, running: tuple[Batch, Sequence[jax.Array]] | None, take: Take) -> None:
        """Wait for the values of a batch and hand them over."""
        if running is not None:
            batch, values = running
            for site, value in zip(self._sites, jax.tree.map(np.asarray, values), strict=True):
                take(batch, site, value)
