"""What runs the model while it is captured, and what ``auto`` takes for it and for its dtype."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import numpy as np

from saejax.activations.plan import Batch, Plan
from saejax.activations.reader import Reader, Take
from saejax.activations.request import CaptureRequest
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.sites import AnySite, OtherSite, Site
from saejax.settings import CaptureConfig, MeshConfig
from saejax.workspace import Run

BACKENDS = ("torch", "jax")
DTYPES = ("float32", "bfloat16")  # of the model's weights and products
_TIMED = 3  # batches that each is timed on, after one that is not: programs are compiled and memory is touched there


def ways(config: CaptureConfig, modules: bool) -> list[CaptureConfig]:
    """The settings with every choice in place of ``auto``, the first one best where nothing is measured.

    Args:
      config: as asked for.
      modules: whether modules of the PyTorch model are among the sites, which torch alone can read.
    """
    backends = ("torch",) if modules else BACKENDS
    backends = backends if config.backend == "auto" else (config.backend,)
    dtypes = DTYPES if config.dtype == "auto" else (config.dtype,)
    return [
        dataclasses.replace(config, backend=backend, dtype=dtype)
        for backend, dtype in itertools.product(backends, dtypes)
    ]


def load_reader(run: Run, request: CaptureRequest, plan: Plan, config: CaptureConfig) -> Reader:
    """The backend, which alone is imported: torch takes seconds to import, and JAX takes the devices.

    Args:
      config: settings of which backend and dtype count, neither of them ``auto``.
    """
    if request.other is not None:
        own = dataclasses.replace(
            request, sites=tuple(site for site in request.sites if not isinstance(site, OtherSite)), other=None
        )
        return PairReader(*(load_reader(run, each, plan, config) for each in (own, request.other)))
    if config.backend == "torch":
        from saejax.activations.torch_capture import SiteReader

        return SiteReader(source.load_torch_model(request.source, config.dtype), request.sites)
    from saejax.activations.jax_capture import DecoderReader
    from saejax.parallel.mesh import make_mesh

    mesh, decoder = make_mesh(run.configs[MeshConfig]), cast(DecoderConfig, request.decoder)
    sites = [site for site in request.sites if isinstance(site, Site)]  # which all are: modules were refused
    return DecoderReader(request.source, decoder, sites, plan.padded_shape, mesh, config.dtype, config.read_dtype)


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


def fastest(
    load: Callable[[CaptureConfig], Reader], choices: Sequence[CaptureConfig], batch: Batch, say: Callable[[str], None]
) -> CaptureConfig:
    """The way that runs a batch in the least time, the best of ``_TIMED``; one is loaded at a time.

    Args:
      load: gives the reader of a way, which is closed here.
      choices: of ``ways``.
      batch: of the text that is to be captured.
      say: told all speeds.
    """
    rates = []
    for choice in choices:
        reader, ends = load(choice), [time.perf_counter()]

        def take(batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> None:
            """Copies the value, as the store does."""
            value_BxTxD.copy()

        for _ in range(1 + _TIMED):
            reader.read([batch], take)
            ends.append(time.perf_counter())
        reader.close()
        rates.append(batch.rows / float(np.diff(ends)[1:].min()))
    best = choices[int(np.argmax(rates))]
    speeds = ", ".join(f"{_name(choice)} {rate:,.0f}" for choice, rate in zip(choices, rates, strict=True))
    say(f"capture: auto takes {_name(best)}; tokens/s on batches of {batch.rows:,}: {speeds}")
    return best


def _name(choice: CaptureConfig) -> str:
    return f"{choice.backend} in {choice.dtype}"
