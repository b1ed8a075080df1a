"""What runs the model while it is captured, and which of the two ``--capture.backend=auto`` takes."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import numpy as np

from saejax.activations.plan import Batch, Plan
from saejax.activations.reader import Reader, Take
from saejax.activations.request import CaptureRequest
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.sites import AnySite, OtherSite, Site
from saejax.settings import CaptureConfig
from saejax.workspace import Run

BACKENDS = ("torch", "jax")
_TIMED = 2  # batches that each is timed on, after one that is not: programs are compiled and memory is touched there


def load_reader(run: Run, request: CaptureRequest, plan: Plan, backend: str) -> Reader:
    """The backend, which alone is imported: torch takes seconds to import, and JAX takes the devices."""
    if request.other is not None:
        own = dataclasses.replace(
            request, sites=tuple(site for site in request.sites if not isinstance(site, OtherSite)), other=None
        )
        readers = [load_reader(run, each, plan, backend) for each in (own, request.other)]
        return PairReader(*readers)
    config: CaptureConfig = run.configs["capture"]
    if backend == "torch":
        from saejax.activations.torch_capture import SiteReader

        return SiteReader(source.load_torch_model(request.source, config.dtype), request.sites)
    from saejax.activations.jax_capture import DecoderReader
    from saejax.parallel import make_mesh

    mesh, decoder = make_mesh(run.configs["mesh"]), cast(DecoderConfig, request.decoder)
    sites = [site for site in request.sites if isinstance(site, Site)]  # which all are: modules were refused
    return DecoderReader(request.source, decoder, sites, plan.padded_shape, mesh, config.dtype, config.store_dtype)


class PairReader:
    """Two models that read the same batches, one after the other; sites of the second are ``OtherSite``.

    Attributes:
      widths: as in ``reader.Reader``.
    """

    def __init__(self, first: Reader, second: Reader):
        self._first, self._second = first, second
        self.widths: dict[AnySite, int] = first.widths | {_of_other(site): d for site, d in second.widths.items()}

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """See ``reader.Reader``."""
        held: list[Batch] = []

        def noted() -> Iterator[Batch]:
            for batch in batches:
                held.append(batch)
                yield batch

        self._first.read(noted(), take)
        self._second.read(held, lambda batch, site, value_BxTxD: take(batch, _of_other(site), value_BxTxD))

    def close(self) -> None:
        """See ``reader.Reader``."""
        self._first.close()
        self._second.close()


def _of_other(site: AnySite) -> OtherSite:
    return OtherSite(cast(Site, site))  # modules of a second model were refused


def faster_backend(load: Callable[[str], Reader], batch: Batch, say: Callable[[str], None]) -> str:
    """The backend that runs a batch in less time, the better of ``_TIMED``; one is loaded at a time.

    Args:
      load: gives the reader of a backend, which is closed here.
      batch: of the text that is to be captured.
      say: told both speeds.
    """
    seconds = {}
    for backend in BACKENDS:
        reader, ends = load(backend), [time.perf_counter()]

        def take(batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> None:
            """Copies the value, as the store does."""
            value_BxTxD.copy()

        for _ in range(1 + _TIMED):
            reader.read([batch], take)
            ends.append(time.perf_counter())
        reader.close()
        seconds[backend] = float(np.diff(ends)[1:].min())
    best = min(BACKENDS, key=lambda backend: seconds[backend])
    speeds = ", ".join(f"{backend} {batch.rows / seconds[backend]:,.0f} tokens/s" for backend in BACKENDS)
    say(f"--capture.backend=auto takes {best}: {speeds} on {_TIMED} batches of {batch.rows:,} tokens")
    return best
