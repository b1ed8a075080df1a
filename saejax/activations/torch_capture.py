"""The torch backend of capture: hooks in a transformers PyTorch model.

All sites are recorded in one pass, which ends at the last of them: what follows it is not run. Where the sites are
those of the decoder, later layers are dropped and take no memory.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from saejax.activations.plan import Batch
from saejax.activations.reader import Take
from saejax.activations.torch_modules import modules_of, places
from saejax.errors import UserError
from saejax.models.sites import AnySite, Site

_PROBE = (1, 2)  # shape of the pass that finds out in which order the sites come, and how wide they are


class _Reached(Exception):
    """The last site was read: the rest of the forward pass is not needed."""


class SiteReader:
    """Runs a model up to the last of some sites and hands over the value at each.

    Args:
      model: a transformers causal language model; if all sites are those of the decoder, layers after the last one are
        dropped from it, and with them goes their memory. It is moved to a GPU if torch has one.
      sites: what to read, at least one.

    Attributes:
      widths: width of the values at each site.

    Raises:
      UserError: the model has no such module, or a forward pass does not run it once and to a vector for each token.
    """

    def __init__(self, model: Any, sites: Sequence[AnySite]):
        self._model = model
        layers = [site.layer for site in sites if isinstance(site, Site)]
        if len(layers) == len(sites):
            path = modules_of(model).layers
            model.set_submodule(path, model.get_submodule(path)[: 1 + max(layers)])
            self._model = model.base_model  # without the head, which may be large
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._accepted = inspect.signature(self._model.forward).parameters
        self._places = {site: places(model, site) for site in sites}
        self._sites, self.widths = self._probe(sites)

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """See ``reader.Reader``. Sites of a batch come in the order of the forward pass."""
        for batch in batches:
            self._read(batch, take)

    def close(self) -> None:
        """Gives the model's memory back; the reader cannot be used afterwards."""
        del self._model, self._places
        if torch.cuda.is_available():
            torch.cuda.init_cache()  # torch would keep it for itself, and JAX could not have it

    def _read(self, batch: Batch, take: Take) -> None:
        last = self._sites[-1]

        def taken(site: AnySite, value: torch.Tensor) -> None:
            take(batch, site, _array(_vectors(site, value, batch.ids_BxT.shape)))
            if site == last:
                raise _Reached

        with contextlib.suppress(_Reached), self._hooks(self._sites, taken):
            self._forward(batch.ids_BxT, batch.mask_BxT)
            raise RuntimeError(f"the forward pass of {type(self._model).__name__} did not come by {last}")

    def _probe(self, sites: Sequence[AnySite]) -> tuple[list[AnySite], dict[AnySite, int]]:
        """The sites in the order in which a forward pass comes by them, and their widths."""
        seen: list[AnySite] = []
        widths: dict[AnySite, int] = {}

        def look(site: AnySite, value: torch.Tensor) -> None:
            seen.append(site)
            widths[site] = _vectors(site, value, _PROBE).shape[-1]

        with self._hooks(sites, look):
            self._forward(np.zeros(_PROBE, np.int32), np.ones(_PROBE, np.int64))
        for site in sites:
            if seen.count(site) != 1:
                raise UserError(
                    f"a forward pass runs the module of {site} {seen.count(site)} times, expected once: name another"
                )
        return seen, {site: widths[site] for site in sites}

    def _forward(self, ids_BxT: np.ndarray, mask_BxT: np.ndarray) -> None:
        inputs = dict(input_ids=ids_BxT.astype(np.int64), attention_mask=mask_BxT)
        options = {
            name: torch.from_numpy(array).to(self._device)
            for name, array in inputs.items()
            if name in self._accepted  # recurrent models know no mask, and need none: padding is on the right
        }
        without_cache = dict(use_cache=False) if "use_cache" in self._accepted else {}
        with torch.inference_mode():
            self._model(**options, **without_cache)

    @contextlib.contextmanager
    def _hooks(self, sites: Sequence[AnySite], take: Callable[[AnySite, Any], None]) -> Iterator[None]:
        """Calls ``take`` at every site; where a pass comes by several at once, in the order of ``sites``."""
        handles = []
        try:
            for site in sites:
                collect = _sum_of(len(self._places[site]), functools.partial(take, site))
                handles += [_hook(module, after, collect) for module, after in self._places[site]]
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(module: torch.nn.Module, after: bool, use: Callable[[Any], None]) -> Any:
    """Calls ``use`` with the module's output, or with its first input before it runs."""

    def look(module: Any, args: tuple, kwargs: dict, output: Any = None) -> None:
        use(output if after else args[0] if args else next(iter(kwargs.values())))

    register = module.register_forward_hook if after else module.register_forward_pre_hook
    return register(look, with_kwargs=True)


def _sum_of(count: int, use: Callable[[Any], None]) -> Callable[[Any], None]:
    """A function that calls ``use`` with the sum of ``count`` values when it was called with so many."""
    parts: list[Any] = []

    def collect(value: Any) -> None:
        parts.append(_tensor(value))
        if len(parts) == count:
            total = functools.reduce(torch.add, parts)
            parts.clear()
            use(total)

    return collect


def _tensor(value: Any) -> Any:
    """The first of what a module takes or gives, where it is several."""
    while isinstance(value, tuple | list | Mapping):
        value = next(iter(value.values() if isinstance(value, Mapping) else value), None)
    return value


def _vectors(site: AnySite, value: Any, shape: tuple[int, int]) -> torch.Tensor:
    """The value as [B, T, width]. Some modules have documents and tokens in one dimension."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        if value.ndim == 2 and value.shape[0] == shape[0] * shape[1]:
            return value.reshape(*shape, -1)
        if value.ndim == 3 and value.shape[:2] == shape:
            return value
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
    raise UserError(
        f"the value at {site} is {found} for {shape[0]} documents of {shape[1]} tokens: expected one vector of "
        "floating-point numbers for each token; name another module"
    )


def _array(value: torch.Tensor) -> np.ndarray:
    """The values on the host; numpy has bfloat16 through ml_dtypes only."""
    value = value.to("cpu")
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
