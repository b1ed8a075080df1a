"""The interface of a capture backend."""

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from saejax.activations.plan import Batch
from saejax.models.sites import AnySite

Take = Callable[[Batch, AnySite, np.ndarray], None]


class Reader(Protocol):
    """A backend of capture.

    Attributes:
      widths: width of the values at every site.
    """

    widths: dict[AnySite, int]

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """Run the batches, in their order, up to the last of the wanted sites.

        This calls ``take(batch, site, value_BxTxD)`` once for every batch and site, batches in order. The value is fp32
        or bfloat16, may be longer than the batch's T, and is not changed or kept by ``take``.
        """

    def close(self) -> None:
        """Give back the devices' memory."""
