"""Sites of any causal language model of transformers, read and changed by hooks.

Where a layer has its sites is read off a forward pass on a few tokens, not off tables of architectures:

1. ``resid_pre`` and ``resid_post`` are what a layer is called with and what it returns;
2. of the modules of a layer, two are attention and the MLP if their outputs, added to ``resid_pre`` in one of the
   orders in which models add them, give ``resid_post`` bit for bit (some outputs hold the stream already, and some
   are scaled first);
3. ``resid_mid`` is ``resid_pre + attn_out``, and a change of it is a change of ``attn_out``;
4. ``mlp_act`` is the input of the projection whose output is the MLP's, bit for bit, perhaps with the stream added.

Where no two modules are as in 2, ``attn_out``, ``resid_mid`` and ``mlp_out`` are refused for the architecture, and
``mlp_act`` where no projection is as in 4, as in mixtures of experts.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from saejax.errors import UserError
from saejax.models.sites import HEAD_KINDS, NEURONS, PATTERN, AnySite, ModuleSite, Site
from saejax.models.torch_devices import own_device, place_model

Visit = Callable[[AnySite, torch.Tensor], torch.Tensor]  # from a site's value to the one that the model goes on with
_PROBE_IDS = np.arange(1, 9, dtype=np.int32)[None]  # tokens of the pass that finds where sites are
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|^fc\d")
_HELPER = re.compile(r"norm|dropout|^ln")
# The part of ``_Layer`` that a site of some kind needs.
_BRANCHES = {
    "attn_out": "attention",
    "resid_mid": "attention",
    "mlp_in": "mlp_input",
    NEURONS: "last_projection",
    "mlp_out": "mlp",
}


class _Stop(Exception):
    """Raised once all wanted sites were read: the rest of the forward pass is not needed."""


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A module whose output attention or the MLP adds to the residual stream."""

    name: str  #: name of the module in its layer
    scale: float = 1.0  #: factor on the output before it is added (Granite)
    includes_stream: bool = False  #: whether the output is the sum already (BLOOM)

    def read(self, output: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        """Return what is added to ``stream``, which is needed only where the output includes it."""
        if self.includes_stream:
            return output - stream
        return output if self.scale == 1 else output * self.scale

    def write(self, added: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        """Return the module's output with which ``added`` is added."""
        if self.includes_stream:
            return added + stream
        return added if self.scale == 1 else added / self.scale


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Modules at which a layer has its sites; None: not resolved."""

    #: attention and mlp: what is added to the stream.
    attention: _Branch | None
    mlp: _Branch | None
    mlp_input: str | None  #: name of the module that reads ``mlp_in``
    last_projection: str | None  #: name of the MLP's last projection, which reads ``mlp_act``


class HookedModel:
    """A transformers model whose sites can be read and changed.

    Args:
      model: a causal language model. It is moved to a GPU if torch has one, or to several if one is too small, and its
        parameters take no gradients.
      last_layer: if given, the model is cut after this layer, and later layers give back their memory.
      device: where it runs; None: on the device of ``torch_devices.own_device``.

    Raises:
      UserError: the model is not causal.

    Attributes:
      model: the model, without its head where it was cut.
      device: where it runs; of several GPUs, the one that embeds tokens.
      n_layers: number of its layers; 0 where no list of layers was found.
    """

    def __init__(self, model: Any, last_layer: int | None = None, device: torch.device | None = None):
        self._name = type(model).__name__
        self._path = path = _layers_path(model)
        self.n_layers = len(model.get_submodule(path)) if path else 0
        if last_layer is not None and path:
            model.set_submodule(path, model.get_submodule(path)[: last_layer + 1])
        self._layers = list(model.get_submodule(path)) if path else []
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.model = place_model(model if last_layer is None else model.base_model, device or own_device())
        self.model.requires_grad_(False).eval()
        self.device = self.model.get_input_embeddings().weight.device
        self._checked: set[AnySite] = set()
        self._skipped = threading.local()
        # Families differ in what they take: some know no mask, others no positions.
        self.accepted = frozenset(inspect.signature(self.model.forward).parameters)
        self._check_causal()

    def _check_causal(self) -> None:
        """Raise a ``UserError`` if the model's output changes with later tokens: BERT's class passes for causal."""
        ids = np.repeat(_PROBE_IDS, 2, axis=0)
        ids[1, -1] = ids[1, 0]
        with torch.inference_mode():
            first, second = self.run(ids, None, (), lambda site, value: value)[0][:, :-1]
        if (first - second).abs().max() > torch.finfo(first.dtype).eps ** 0.5 * first.abs().max():
            raise UserError(
                f"{self._name} attends to later tokens, as encoders do: expected a causal language model; use another"
            )

    def check(self, site: AnySite) -> None:
        """Raise a ``UserError`` unless the model has the site and a forward pass comes by it once."""
        if site not in self._checked:
            self.widths([site])
            self._checked.add(site)

    def widths(self, sites: Sequence[AnySite]) -> dict[AnySite, int]:
        """Return the width of each site.

        Raises:
          UserError: a site does not exist, or its module does not run once and to a vector for each token.
        """
        for site in sites:
            self._check_exists(site)
        seen: dict[AnySite, list[int]] = {site: [] for site in sites}

        def look(site: AnySite, value: torch.Tensor) -> torch.Tensor:
            """Record a site's width."""
            seen[site].append(value.shape[-1])
            return value

        with torch.inference_mode():
            self.run(_PROBE_IDS[:, :2], None, sites, look)
        for site, widths in seen.items():
            if len(widths) != 1:
                times = f"{len(widths)} times"
                raise UserError(f"a forward pass runs the module of {site} {times}, expected once: name another")
        return {site: width for site, (width,) in seen.items()}

    def run(
        self,
        ids_BxT: np.ndarray,
        mask: np.ndarray | None,
        sites: Collection[AnySite],
        visit: Visit,
        read_only: bool = False,
        **options: Any,
    ) -> Any:
        """Run the model.

        Args:
          ids_BxT: token ids.
          mask: true at real tokens, those in the model's cache first; None: everywhere.
          sites: where ``visit`` is called, with the value [B, T, width].
          visit: returns the value that the model goes on with, or the same tensor.
          read_only: stop once every site was visited.
          options: further arguments of the model; arguments that it does not accept are left out.

        Returns:
          The model's output; None if it was stopped.
        """
        unvisited = set(sites)

        def count_down(site: AnySite, value: torch.Tensor) -> torch.Tensor:
            """Visit a site, and stop the pass after the last one."""
            value = visit(site, value)
            unvisited.discard(site)
            if not unvisited and read_only:
                raise _Stop
            return value

        mask = np.ones_like(ids_BxT) if mask is None else mask
        inputs = {name: self.tensor(array) for name, array in (("input_ids", ids_BxT), ("attention_mask", mask))}
        arguments = {"use_cache": False, **inputs, **options}
        with contextlib.suppress(_Stop), self._hooked(sites, count_down, ids_BxT.shape):
            return self.model(**{name: value for name, value in arguments.items() if name in self.accepted})
        return None

    @contextlib.contextmanager
    def skipping(self, count: int) -> Iterator[None]:
        """Make the first ``count`` layers hand on the stream as it is, in this thread and in a block."""
        returned_parts, _ = self._returned_parts, self._resolved  # by passes of all layers
        # Not by hooks, which cannot keep a module from running.
        for index, layer in enumerate(self._layers[:count]):
            if getattr(layer.forward, "func", None) != self._forward:
                layer.forward = functools.partial(self._forward, index, returned_parts[index], layer.forward)
        self._skipped.count = count
        try:
            yield
        finally:
            self._skipped.count = 0

    def _forward(self, index: int, parts: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer, or hand on its input, in a tuple of so many parts (0: alone), where it is skipped."""
        if index >= getattr(self._skipped, "count", 0):
            return forward(*args, **kwargs)
        value = args[0] if args else next(iter(kwargs.values()))
        return (value, *[None] * (parts - 1)) if parts else value

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return integers as a tensor on the model's device."""
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def _check_exists(self, site: AnySite) -> None:
        """Raise a ``UserError`` unless the model has a place for the site."""
        if isinstance(site, ModuleSite):
            names = [name for name in self._modules if name]
            if site.path not in names:
                near = difflib.get_close_matches(site.path, names, n=3, cutoff=0.5) or names[:3]
                raise UserError(f"{site}: {self._name} has no such module; expected a path such as {', '.join(near)}")
            return
        if not isinstance(site, Site):
            raise UserError(f"{site} is a site of the second model: run that model and name the site there")
        if not 0 <= site.layer < self.n_layers:
            raise UserError(
                f"there is no site {site}: {self._name} has {self.n_layers} layers"
                + (f", 0 to {self.n_layers - 1}" if self.n_layers else " that are in one list; use module:<path>")
            )
        if site.kind == PATTERN:
            raise UserError(
                f"{site} cannot be read in {self._name}, which runs in PyTorch: attention patterns need a "
                "model of a JAX family (backend='jax')"
            )
        part = _BRANCHES.get(site.kind)
        if site.kind in HEAD_KINDS or (part and getattr(self._resolved[site.layer], part) is None):
            raise UserError(
                f"the site {site} cannot be resolved in {self._name}: name a module of the layer, as in "
                f"module:{self._path}.{site.layer}.<path>"
            )

    @contextlib.contextmanager
    def _hooked(self, sites: Collection[AnySite], visit: Visit, shape: tuple[int, ...]) -> Iterator[None]:
        """Call ``visit`` at every site while the block runs."""
        handles: list[Any] = []
        kinds: dict[int, set[str]] = {}
        if any(isinstance(site, Site) and site.kind in _BRANCHES for site in sites):
            self._resolved  # noqa: B018 - a pass of its own, which must not come by these hooks
        try:
            for site in sites:
                if isinstance(site, ModuleSite):
                    use = functools.partial(_visit_vectors, visit, site, shape)
                    handles.append(_hook(self._modules[site.path], site.kind == "module", use))
                elif isinstance(site, Site):
                    kinds.setdefault(site.layer, set()).add(site.kind)
            for layer, wanted in kinds.items():
                handles += self._hook_layer(layer, wanted, visit, shape)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_layer(self, layer: int, kinds: set[str], visit: Visit, shape: tuple[int, ...]) -> list[Any]:
        """Register hooks at the sites of one layer; the streams that other sites are made of are kept in ``stream``."""
        module, stream = self._layers[layer], dict[str, torch.Tensor]()
        device = next((weight.device for weight in module.parameters()), self.device)

        def at(kind: str, value: torch.Tensor) -> torch.Tensor:
            """Visit a site of the layer if it is wanted."""
            return _visit_vectors(visit, Site(kind, layer), shape, value) if kind in kinds else value

        def enter(value: torch.Tensor) -> torch.Tensor:
            """Visit the stream that enters the layer, and keep it; it may come from another GPU."""
            stream["pre"] = value = at("resid_pre", value.to(device))
            return value

        handles = [_hook(module, False, enter)]
        if kinds & {"attn_out", "resid_mid", "mlp_out"}:
            attention, mlp = self._resolved[layer].attention, self._resolved[layer].mlp
            assert attention and mlp  # or the sites were refused

            def attend(output: torch.Tensor) -> torch.Tensor:
                """Visit ``attn_out`` and ``resid_mid``, and write their changes into attention's output."""
                before = attention.read(output, stream["pre"])
                after = at("attn_out", before)
                if "resid_mid" in kinds or mlp.includes_stream:
                    middle = stream["pre"] + after
                    stream["mid"] = at("resid_mid", middle)
                    # Only where the hook changed it: (pre + after) - pre is not ``after`` bit for bit.
                    after = after if stream["mid"] is middle else stream["mid"] - stream["pre"]
                return output if after is before else attention.write(after, stream["pre"])

            def add_mlp(output: torch.Tensor) -> torch.Tensor:
                """Visit ``mlp_out`` and write its change into the MLP's output."""
                flat, middle = output.shape, stream.get("mid")
                before = mlp.read(output.reshape(*shape, -1), middle)
                after = at("mlp_out", before)
                return output if after is before else mlp.write(after, middle).reshape(flat)

            handles.append(_hook(module.get_submodule(attention.name), True, attend))
            if "mlp_out" in kinds:
                handles.append(_hook(module.get_submodule(mlp.name), True, add_mlp))
        if "mlp_in" in kinds:
            name = self._resolved[layer].mlp_input
            assert name
            handles.append(_hook(module.get_submodule(name), False, functools.partial(at, "mlp_in")))
        if NEURONS in kinds:
            name = self._resolved[layer].last_projection
            assert name
            handles.append(_hook(module.get_submodule(name), False, functools.partial(at, NEURONS)))
        if "resid_post" in kinds:
            handles.append(_hook(module, True, functools.partial(at, "resid_post")))
        return handles

    @functools.cached_property
    def _returned_parts(self) -> list[int]:
        """Return how many values each layer returns in a tuple; 0: a tensor alone."""
        counts: list[int] = []

        def count(module: Any, args: Any, output: Any) -> None:
            """Record how many parts a layer returns."""
            counts.append(len(output) if isinstance(output, tuple) else 0)

        self._probe([layer.register_forward_hook(count) for layer in self._layers])
        return counts

    @functools.cached_property
    def _resolved(self) -> list[_Layer]:
        """The modules at which each layer has its sites, found in one forward pass."""
        seen: list[dict[tuple[str, bool], torch.Tensor]] = [{} for _ in self._layers]
        handles = []
        unknown = torch.zeros(0)

        def record(values: dict[Any, torch.Tensor], name: tuple[str, bool], value: Any) -> Any:
            """Record what a module took or returned."""
            # One vector for each token, in any shape: some MLPs take prompts and tokens as one dimension.
            if isinstance(value, torch.Tensor) and value.numel() == _PROBE_IDS.size * value.shape[-1]:
                # A copy: some models add in place. Phi runs one dropout twice, which then is no module's output.
                values[name] = unknown if name in values else value.reshape(*_PROBE_IDS.shape, -1).to("cpu", copy=True)
            return value

        for layer, values in zip(self._layers, seen, strict=True):
            for name, module in {"": layer, **dict(layer.named_children()), **_mlp_projections(layer)}.items():
                for after in (False, True):
                    handles.append(_hook(module, after, functools.partial(record, values, (name, after))))
        self._probe(handles)
        return [_resolve(layer, values) for layer, values in zip(self._layers, seen, strict=True)]

    def _probe(self, handles: Sequence[Any]) -> None:
        """Run a few tokens, and remove the hooks that recorded the pass."""
        with torch.inference_mode():
            self.run(_PROBE_IDS, None, (), lambda site, value: value)
        for handle in handles:
            handle.remove()


def _layers_path(model: Any) -> str:
    """Return the path of the list of layers of a model's text decoder; "" if none is found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # Within the text decoder: a tower for images may have as many layers.
    inside = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return name
    return ""


def _resolve(layer: nn.Module, seen: Mapping[tuple[str, bool], torch.Tensor]) -> _Layer:
    """Find the two modules whose outputs, added to ``resid_pre``, give ``resid_post``; see the file's start.

    ``seen`` is what the layer ("") and its modules took, and returned (True), by name.
    """
    # In the order of the pass; the projections within an MLP are no children of the layer.
    outputs = {name: value for (name, after), value in seen.items() if after and name and "." not in name}
    mlp_input = next((name for name in outputs if _is_named(_MLP, name)), None)
    inner = mlp_input, _find_last_projection(layer, seen)
    pre, post = seen.get(("", False)), seen.get(("", True))
    if pre is None or post is None:
        return _Layer(None, None, *inner)
    candidates = {name: value for name, value in outputs.items() if value.shape == pre.shape}
    for attention, mlp in itertools.permutations(candidates, 2):
        if _is_named(_MLP, attention) or _is_named(_ATTENTION, mlp):
            continue
        a, m = candidates[attention], candidates[mlp]
        for scale in dict.fromkeys((1.0, float(getattr(layer, "residual_multiplier", 1.0)))):
            sums = (pre + a * scale) + m * scale, (pre + m * scale) + a * scale, pre + (a * scale + m * scale)
            if any(torch.equal(total, post) for total in sums):
                return _Layer(_Branch(attention, scale), _Branch(mlp, scale), *inner)
        if torch.equal(m, post) and _is_named(_MLP, mlp) and _is_named(_ATTENTION, attention):
            for includes, middle in ((False, pre + a), (True, a)):
                same_shape = (value for value in seen.values() if value is not a and value.shape == pre.shape)
                if any(torch.equal(value, middle) for value in same_shape):
                    branches = _Branch(attention, includes_stream=includes), _Branch(mlp, includes_stream=True)
                    return _Layer(*branches, *inner)
    return _Layer(None, None, *inner)


def _mlp_projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a layer's MLP that have one matrix, by their names in the layer."""
    return {
        name: module
        for name, module in layer.named_modules()
        if _is_named(_MLP, name.partition(".")[0]) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }


def _find_last_projection(layer: nn.Module, seen: Mapping[tuple[str, bool], torch.Tensor]) -> str | None:
    """Return the name of the projection whose output is the MLP's, alone or added to a value of the layer."""
    projections = _mlp_projections(layer)
    for name in reversed([name for name, after in seen if after and name in projections]):
        # The MLP is a child of the layer, or its projections are (OPT).
        output, whole = seen[name, True], seen.get((name.partition(".")[0], True))
        if whole is None or output.shape != whole.shape:
            continue
        streams = (value for (path, _), value in seen.items() if "." not in path and value.shape == whole.shape)
        if torch.equal(output, whole) or any(torch.equal(value + output, whole) for value in streams):
            return name
    return None


def _is_named(kind: re.Pattern[str], name: str) -> bool:
    """Return whether a module is attention, or an MLP, by its name."""
    return bool(kind.search(name)) and not _HELPER.search(name)


def _hook(module: nn.Module, after: bool, use: Callable[[Any], Any]) -> Any:
    """Make ``use`` change the module's output, or its first input before it runs; the same object is no change.

    Passes in other threads go by: JAX programs may be in the middle of a pass while the main thread begins another.
    """
    thread = threading.get_ident()

    def change(whole: Any) -> Any:
        """Return what a module takes or returns, changed; None where it is not."""
        if threading.get_ident() != thread:
            return None
        value = _first(whole)
        new = use(value)
        return None if new is value else _with_first(whole, new)

    def after_hook(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        """Change the module's output."""
        return change(output)

    def before_hook(module: Any, args: tuple, kwargs: dict) -> Any:
        """Change the module's first input."""
        name = None if args else next(iter(kwargs))
        changed = change(args[0] if name is None else kwargs[name])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: changed})

    if after:
        return module.register_forward_hook(after_hook, with_kwargs=True)
    return module.register_forward_pre_hook(before_hook, with_kwargs=True)


def _first(value: Any) -> Any:
    """Return the first of what a module takes or returns, where it is several."""
    while isinstance(value, tuple | list | Mapping):
        value = next(iter(value.values() if isinstance(value, Mapping) else value), None)
    return value


def _with_first(value: Any, new: torch.Tensor) -> Any:
    """Return what a module takes or returns with ``new`` in place of ``_first`` of it."""
    if isinstance(value, tuple | list):
        return type(value)([_with_first(value[0], new), *value[1:]])
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        name = next(iter(value))
        changed[name] = _with_first(value[name], new)
        return changed
    return new


def _visit_vectors(visit: Visit, site: AnySite, shape: tuple[int, ...], value: Any) -> torch.Tensor:
    """Call ``visit`` with the value as [B, T, width]. Some modules have prompts and tokens in one dimension."""
    vectors = value
    if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == shape[0] * shape[1]:
        vectors = value.reshape(*shape, -1)
    if not isinstance(vectors, torch.Tensor) or vectors.shape[:-1] != shape or not vectors.is_floating_point():
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(
            f"the value at {site} is {kind} for {shape[0]} documents of {shape[1]} tokens: expected one vector of "
            "floating-point numbers for each token; name another module"
        )
    new = visit(site, vectors)
    return value if new is vectors else new.reshape(value.shape)
