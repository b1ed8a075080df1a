"""Capture requests: the model's files, the sites, and what has to be known of the model beforehand.

A request is run by one of two backends: hooks in the transformers model, or our decoder on the mesh.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from saejax.activations.chunker import check_context
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.plan import Batch, Reader, Take
from saejax.activations.settings import CaptureConfig
from saejax.activations.store import DTYPES
from saejax.config import Configs
from saejax.errors import UserError
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.settings import ModelConfig
from saejax.models.sites import AnySite, ModuleSite, OtherSite, Site, parse_site
from saejax.models.tokens import bos_tokens
from saejax.parallel.mesh import document_devices, make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.tasks.settings import CorpusConfig

_IN_TURN = 4  # batches that one of two models reads before the other does
# What tells tokenizers apart that have the same vocabulary.
_SAMPLE = "In 1732 the captain's 48 men saw it: x = 3*(y+2), \u201cnaïve\u201d \u2014 Ωλ, 東京 \U0001f642\n\tEnd."


@dataclasses.dataclass(frozen=True)
class CaptureRequest:
    """A request for a capture."""

    source: source.ModelSource  #: the model's files
    sites: tuple[AnySite, ...]  #: the sites, in the order given
    in_torch: bool  #: whether PyTorch runs the model, by hooks; otherwise the decoder does
    #: the decoder's configuration; None if it does not know the model, or modules are asked for.
    decoder: DecoderConfig | None
    context: int | None  #: the longest input in tokens; None: it has no limit
    #: the request for the second model, whose sites are also among ``sites``; None: no second model.
    second: "CaptureRequest | None" = None

    def widths(self) -> dict[AnySite, int] | None:
        """Return the width of every site; None where the model has to be run to know it."""
        more = self.second.widths() if self.second else {}
        if self.decoder is None or more is None or any(isinstance(site, ModuleSite) for site in self.sites):
            return None
        of_other: dict[AnySite, int] = {
            OtherSite(site): width for site, width in more.items() if isinstance(site, Site)
        }
        of_first: dict[AnySite, int] = {site: site.width(self.decoder) for site in self.sites if isinstance(site, Site)}
        return {site: (of_first | of_other)[site] for site in self.sites}


def read_request(configs: Configs) -> CaptureRequest:
    """Return the capture request of the settings.

    Raises:
      UserError: the model cannot be found or read, or a site does not exist, is named twice or is not for the backend.
    """
    config = configs[CaptureConfig]
    model_source = source.resolve(configs[ModelConfig])
    in_torch = source.runs_in_torch(configs[ModelConfig])
    sites = parse_sites(config.sites, "torch" if in_torch else configs[ModelConfig].backend)
    of_other = tuple(site for site in sites if isinstance(site, OtherSite))
    if of_other:
        first = dataclasses.replace(config, sites=tuple(str(site) for site in sites if site not in of_other))
        if not first.sites:
            raise UserError(f"all sites are of the second model, such as {sites[0]}: name it by --model.path instead")
        request, second = read_request(configs | first), _other_request(configs, model_source, of_other)
        # Documents are cut for both models: the shorter context is the limit.
        contexts = [context for context in (request.context, second.context) if context is not None]
        return dataclasses.replace(request, sites=sites, context=min(contexts, default=None), second=second)
    fields, where = source.read_model_config(model_source.folder), str(model_source.folder / "config.json")
    modules = any(isinstance(site, ModuleSite) for site in sites)
    if modules or (in_torch and not _is_readable(fields, where)):
        return CaptureRequest(model_source, sites, True, None, source.longest_input(model_source))
    decoder = read_config(fields, where)
    for site in sites:
        if isinstance(site, Site):
            site.check(decoder)
    return CaptureRequest(model_source, sites, in_torch, decoder, decoder.context)


def check_limits(configs: Configs, names: Iterable[str] = ()) -> None:
    """Raise a ``UserError`` if pieces of text or sites are beyond the models, as far as their ``config.json`` tells.

    Only of models that run in PyTorch: of others preflight tells.
    """
    first, sites = configs[ModelConfig], [parse_site(name) for name in names]
    in_second = [site.site for site in sites if isinstance(site, OtherSite)]
    for model, of_model in ((first, sites), (source.other_model(first), in_second)):
        if not model or not source.runs_in_torch(model):
            continue
        context, layers = source.known_limits(model)
        if context is not None:
            check_context(configs[CorpusConfig], context)
        for site in of_model:
            if isinstance(site, Site) and layers is not None and not 0 <= site.layer < layers:
                raise UserError(f"there is no site {site}: the model has {layers} layers, 0 to {layers - 1}")


def _is_readable(fields: Mapping[str, Any], where: str) -> bool:
    """Return whether the decoder knows a model of this ``config.json``, whose sites then have known widths."""
    try:
        return bool(read_config(fields, where))
    except UserError:
        return False


def _other_request(configs: Configs, first: source.ModelSource, sites: Sequence[OtherSite]) -> CaptureRequest:
    """Return the capture request for the second model.

    Raises:
      UserError: there is none, it has another tokenizer, or what ``read_request`` refuses.
    """
    model = source.other_model(configs[ModelConfig])
    if model is None:
        raise UserError(f"the site {sites[0]} is of a second model: name that by --model.other")
    second = dataclasses.replace(configs[CaptureConfig], sites=tuple(str(site.site) for site in sites))
    request = read_request(configs | model | second)
    check_one_tokenizer(first, request.source)
    return request


def check_one_tokenizer(first: source.ModelSource, second: source.ModelSource) -> None:
    """Raise a ``UserError`` unless two models read the same text as the same tokens; special ones may differ."""
    tokenizer, second_tokenizer = source.load_tokenizer(first), source.load_tokenizer(second)
    other_ids, special = (
        second_tokenizer.get_vocab(),
        {*tokenizer.added_tokens_encoder, *second_tokenizer.added_tokens_encoder},
    )
    # Special tokens may differ: a tuned model often adds some, and text has none of them.
    apart = [
        token for token, id in tokenizer.get_vocab().items() if token not in special and other_ids.get(token) != id
    ]
    if apart or tokenizer(_SAMPLE)["input_ids"] != second_tokenizer(_SAMPLE)["input_ids"]:
        count = f"of {len(tokenizer.get_vocab())} tokens {len(apart)} differ"
        difference = count if apart else "they split text differently"
        raise UserError(
            f"{first.name} and {second.name} do not share a tokenizer ({difference}): a crosscoder of two models reads "
            "both on the same tokens; experiments.transfer compares models of different tokenizers"
        )


def begins_with_bos(request: CaptureRequest, bos: str) -> bool:
    """Return whether every document begins with the tokenizer's BOS token, with ``--capture.bos=...``."""
    tokenizer = source.load_tokenizer(request.source)
    return bool(bos_tokens(tokenizer, bos))


def parse_sites(names: Sequence[str], backend: str) -> tuple[AnySite, ...]:
    """Return the sites that ``--capture.sites`` names.

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
                f"--capture.sites names {site}, a module of the PyTorch model: use --model.backend=torch, or a site of "
                "the decoder, such as resid_post.15"
            )
    return sites


def batch_devices(mesh: MeshConfig, request: CaptureRequest) -> int:
    """Return the number of devices over which the rows of a batch are split."""
    models = [request, *([request.second] if request.second else [])]
    return 1 if all(model.in_torch for model in models) else document_devices(make_mesh(mesh))


def load_reader(mesh: MeshConfig, request: CaptureRequest, config: CaptureConfig) -> Reader:
    """Load the backend that reads a plan's batches, and import torch for no other: it takes seconds."""
    if request.second is not None:
        first_sites = tuple(site for site in request.sites if not isinstance(site, OtherSite))
        first = dataclasses.replace(request, sites=first_sites, second=None)
        # Each model by itself: the two may run in different backends.
        return PairReader(*(load_reader(mesh, side, config) for side in (first, request.second)))
    hand_over = DTYPES[config.store_dtype].name
    if request.in_torch:
        from saejax.activations.torch_capture import SiteReader

        return SiteReader(source.load_torch_model(request.source, config.dtype), request.sites, hand_over)
    decoder = cast(DecoderConfig, request.decoder)
    sites = [site for site in request.sites if isinstance(site, Site)]  # all of them: modules were refused
    return DecoderReader(request.source, decoder, sites, make_mesh(mesh), config.dtype, hand_over)


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
        waiting = iter(batches)
        # A few at a time: who gives them may ask whether to stop, and the second model takes as long as the first.
        while some := list(itertools.islice(waiting, _IN_TURN)):
            self._first.read(some, take)
            self._second.read(some, lambda batch, site, value_BxTxD: take(batch, _other_site(site), value_BxTxD))

    def close(self) -> None:
        """See ``plan.Reader``."""
        self._first.close()
        self._second.close()


def _other_site(site: AnySite) -> OtherSite:
    """Return the second model's site of this name."""
    return OtherSite(cast(Site, site))  # modules of a second model were refused
