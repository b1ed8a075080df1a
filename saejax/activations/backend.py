"""The backends of capture: hooks in the transformers model, or our decoder on the mesh."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import cast

from saejax.activations.plan import Batch, Plan, Reader, Take
from saejax.activations.request import CaptureRequest
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.sites import AnySite, OtherSite, Site
from saejax.runner.workspace import Run
from saejax.settings import CaptureConfig, MeshConfig


def load_reader(run: Run, request: CaptureRequest, plan: Plan, config: CaptureConfig) -> Reader:
    """Load the backend that reads the plan's batches, and import no other.

    torch takes seconds to import, and JAX takes the devices.
    """
    if request.second is not None:
        first_sites = tuple(site for site in request.sites if not isinstance(site, OtherSite))
        first = dataclasses.replace(request, sites=first_sites, second=None)
        # Each model by itself: the two may run in different backends.
        return PairReader(*(load_reader(run, each, plan, config) for each in (first, request.second)))
    if config.backend == "torch" or request.needs_torch:
        from saejax.activations.torch_capture import SiteReader

        return SiteReader(source.load_torch_model(request.source, config.dtype), request.sites)
    from saejax.activations.jax_capture import DecoderReader
    from saejax.parallel.mesh import make_mesh

    mesh, decoder = make_mesh(run.configs[MeshConfig]), cast(DecoderConfig, request.decoder)
    sites = [site for site in request.sites if isinstance(site, Site)]  # all of them: modules were refused
    return DecoderReader(request.source, decoder, sites, plan.padded_shape, mesh, config.dtype, config.store_dtype)


class PairReader:
    """A pair of models that read the same batches in turn; sites of the second are ``OtherSite``.

    Attributes:
      widths: as in ``plan.Reader``.
    """

    def __init__(self, first: Reader, second: Reader):
        self._first, self._second = first, second
        self.widths: dict[AnySite, int] = first.widths | {_other_site(site): d for site, d in second.widths.items()}

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """See ``plan.Reader``."""
        kept: list[Batch] = []

        def keep() -> Iterator[Batch]:
            """Yield the batches and keep them for the second model."""
            for batch in batches:
                kept.append(batch)
                yield batch

        self._first.read(keep(), take)
        self._second.read(kept, lambda batch, site, value_BxTxD: take(batch, _other_site(site), value_BxTxD))

    def close(self) -> None:
        """See ``plan.Reader``."""
        self._first.close()
        self._second.close()


def _other_site(site: AnySite) -> OtherSite:
    """Return the second model's site of this name."""
    return OtherSite(cast(Site, site))  # modules of a second model were refused
