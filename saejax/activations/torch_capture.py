"""The torch backend of capture: sites of a transformers PyTorch model, read by hooks.

All sites are recorded in one pass, which ends at the last of them. Where all are sites of layers, later layers are
dropped and take no memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from saejax.activations.plan import Batch, CapturedValues, Take
from saejax.models.sites import AnySite, Site
from saejax.models.torch_hooks import HookedModel


class SiteReader:
    """A reader that runs a model up to the last of some sites and hands over the value at each.

    Args:
      model: a transformers causal language model; layers after the last site are dropped from it. It is moved to a GPU
        if torch has one.
      sites: what to read, at least one.
      hand_over: dtype of the values that are handed over, "float32" or "bfloat16".

    Attributes:
      widths: width of the values at each site.

    Raises:
      UserError: the model has no such site, or a forward pass does not run its module once and to a vector for each
        token.
    """

    def __init__(self, model: Any, sites: Sequence[AnySite], hand_over: str = "float32"):
        self._dtype = getattr(torch, hand_over)
        layers = [site.layer for site in sites if isinstance(site, Site)]
        self._model = HookedModel(model, max(layers) if len(layers) == len(sites) else None)
        self.widths = self._model.widths(sites)

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """See ``plan.Reader``. Sites of a batch come in the order of the forward pass."""
        for batch in batches:

            def visit(site: AnySite, value: torch.Tensor, batch: Batch = batch) -> torch.Tensor:
                """Hand over a value and leave it unchanged."""
                take(batch, site, _measure(value, batch, self._dtype))
                return value

            with torch.inference_mode():
                self._model.run(batch.ids_BxT, batch.mask_BxT, list(self.widths), visit, read_only=True)

    def close(self) -> None:
        """Give the model's memory back; the reader cannot be used afterwards."""
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # torch would keep it for itself, and JAX could not have it


def _measure(value_BxTxD: torch.Tensor, batch: Batch, dtype: torch.dtype) -> CapturedValues:
    """Round a value as it is stored, where the model ran, and add its norms and sums."""
    # A copy: the model may change its own memory, and may not before the value is stored.
    stored_BxTxD = value_BxTxD.to(dtype, copy=True, memory_format=torch.contiguous_format)
    norms_BxT = torch.linalg.vector_norm(stored_BxTxD, dim=-1, dtype=torch.float64).float()
    sums = [
        stored_BxTxD[i, first if is_train else stop : stop].sum(0, dtype=torch.float64)
        for i, (first, stop, is_train) in enumerate(zip(batch.first_B, batch.stop_B, batch.train_B, strict=True))
    ]
    return CapturedValues([_array(stored_BxTxD)], _array(norms_BxT), _array(torch.stack(sums)))


def _array(value: torch.Tensor) -> np.ndarray:
    """Return the values on the host; numpy has bfloat16 through ml_dtypes only."""
    value = value.to("cpu")
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
