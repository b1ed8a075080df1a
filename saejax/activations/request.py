"""What a capture is asked for: the model's files, the sites, and what of the model has to be known beforehand."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.errors import UserError
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.families import FAMILIES, read_config
from saejax.models.sites import AnySite, ModuleSite, Site, parse_site
from saejax.settings import CaptureConfig

# How configurations of all kinds of models call the longest input that they can take.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


@dataclasses.dataclass(frozen=True)
class CaptureRequest:
    """What a capture is asked for.

    Attributes:
      source: the model's files.
      sites: the sites, in the order given.
      decoder: the decoder's configuration; None if only modules are asked for, of a model that it may not know.
      context: the longest input in tokens; None: it has no limit.
    """

    source: source.ModelSource
    sites: tuple[AnySite, ...]
    decoder: DecoderConfig | None
    context: int | None

    def widths(self) -> dict[AnySite, int] | None:
        """Width of every site; None where the model has to be run to know it."""
        if self.decoder is None or not all(isinstance(site, Site) for site in self.sites):
            return None
        return dict.fromkeys(self.sites, self.decoder.d_model)


def read_request(configs: Mapping[str, Any]) -> CaptureRequest:
    """What the settings ask for.

    Raises:
      UserError: the model cannot be found or read, or a site does not exist, is named twice or is not for the backend.
    """
    config: CaptureConfig = configs["capture"]
    sites = parse_sites(config.sites, config.backend)
    found = source.resolve(configs["model"])
    fields, where = source.read_model_config(found.folder), str(found.folder / "config.json")
    modules_only = all(isinstance(site, ModuleSite) for site in sites)
    if modules_only:
        return CaptureRequest(found, sites, None, longest_input(found))
    if fields.get("model_type") not in FAMILIES and config.backend != "jax":
        raise UserError(
            f"{where}: models of the family {fields.get('model_type')!r} have no site such as {sites[0]} here: name "
            "modules of the PyTorch model in --capture.sites, as in module:model.layers.3.mlp"
        )
    decoder = read_config(fields, where)
    for site in sites:
        if isinstance(site, Site):
            site.check(decoder)
    return CaptureRequest(found, sites, decoder, decoder.context)


def longest_input(found: source.ModelSource) -> int | None:
    """The longest input that a model of any family takes, in tokens; None: it has no limit."""
    fields = source.read_model_config(found.folder)
    if fields.get("model_type") in FAMILIES:
        return read_config(fields, str(found.folder / "config.json")).context
    text = fields | (fields.get("text_config") or {})
    return next((text[name] for name in _CONTEXT if text.get(name)), None)


def parse_sites(names: Sequence[str], backend: str) -> tuple[AnySite, ...]:
    """The sites that ``--capture.sites`` names.

    Raises:
      UserError: there are none, or one is unknown, named twice or not for the backend.
    """
    if not names:
        raise UserError("--capture.sites is empty: name at least one site, such as resid_post.15")
    sites = tuple(parse_site(name) for name in names)
    for site in sites:
        if sites.count(site) > 1:
            raise UserError(f"--capture.sites names {site} twice: name each site once")
        if isinstance(site, ModuleSite) and backend == "jax":
            raise UserError(
                f"--capture.sites names {site}, a module of the PyTorch model: use --capture.backend=torch or auto, "
                "or a site of the decoder, such as resid_post.15"
            )
    return sites
