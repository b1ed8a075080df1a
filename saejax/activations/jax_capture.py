"""The JAX backend of capture: our decoder, on the mesh, up to the last site that is wanted."""

from collections.abc import Callable, Iterable, Sequence

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
from saejax.parallel.mesh import sharding


class DecoderReader:
    """A reader that runs a model up to the last of some sites and hands over the value at each.

    Batches are padded to few shapes, each of which is compiled once. While the host stores one batch, the devices run
    the next. Nothing is computed, and no layer's parameters are read, after the last site.

    Args:
      source: the model's files.
      config: configuration of the whole model.
      sites: what to read, at least one.
      padded_shape: gives the [B, T] of batches whose longest document has some length, see ``Plan.padded_shape``.
      mesh: the devices; documents are split over ``data``, heads and MLP over ``model``.
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
        padded_shape: Callable[[int], tuple[int, int]],
        mesh: Mesh,
        dtype: str,
        hand_over: str,
    ):
        self.config, self._sites, self._padded_shape = config, tuple(sites), padded_shape
        self.mesh, self._hand_over = mesh, hand_over
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
        """Return token ids [B, T] and lengths [B] of a batch, in one of few shapes that the mesh divides."""
        documents, length = batch.ids_BxT.shape
        rows, padded = self._padded_shape(length)
        # Over both axes, as buffers on the devices split documents over ``member``, too.
        rows += -rows % (self.mesh.shape["member"] * self.mesh.shape["data"])
        ids_BxT = np.pad(batch.ids_BxT, ((0, rows - documents), (0, padded - length)))
        return ids_BxT, np.pad(batch.stop_B, (0, rows - documents), constant_values=1).astype(np.int32)

    def close(self) -> None:
        """Give back the devices' memory; the reader cannot be used afterwards."""
        self.params = {}

    def _start(self, batch: Batch) -> Sequence[jax.Array]:
        """Send a batch to the devices, without waiting for it."""
        ids_BxT, lengths_B = self.pad_batch(batch)
        placed = jax.device_put((ids_BxT, lengths_B), (sharding(self.mesh, "data", None), sharding(self.mesh, "data")))
        _, values = forward(self.config, self._sites, False, self.params, *placed)
        # On the devices: values for a store in bfloat16 then take half the bytes on their way to the host.
        return jax.tree.map(lambda value: value.astype(self._hand_over), values)

    def _give(self, running: tuple[Batch, Sequence[jax.Array]] | None, take: Take) -> None:
        """Wait for the values of a batch and hand them over."""
        if running is not None:
            batch, values = running
            for site, value in zip(self._sites, jax.tree.map(np.asarray, values), strict=True):
                take(batch, site, value)
