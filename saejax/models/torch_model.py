"""Any causal language model of transformers, behind the interface of ``LanguageModel``.

It runs in PyTorch, beside one device of JAX, with edits made in forward hooks by the same JAX functions. Whatever is
written for the decoder's functions works on it too, through ``torch_bridge``, but for what goes into a layer's
attention.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

from saejax.arguments import suggests_names
from saejax.errors import UserError
from saejax.models import decoding, parity
from saejax.models.config import TorchConfig
from saejax.models.decoding import SamplingParams
from saejax.models.edits import Edit, ForwardPass, fit_values
from saejax.models.generation import StopCondition
from saejax.models.language_model import LanguageModel, Output
from saejax.models.lengths import round_length
from saejax.models.sites import ALL_KINDS, KINDS, NEURONS, AnySite, Site
from saejax.models.source import ModelSource, longest_input
from saejax.models.tokens import Tokens, as_tokens, pad
from saejax.models.torch_bridge import LayerSegment
from saejax.models.torch_devices import own_device
from saejax.models.torch_hooks import HookedModel
from saejax.parallel.mesh import make_mesh, sharding

_PROBE_IDS, _PROBE_STEPS = (7, 9, 3, 8, 2, 5), 4  # of the batch on which generation is tried
_CACHES = ("past_key_values", "cache_params")  # what families call what they keep of earlier tokens
_NO_LIMIT = 2**30  # tokens, where a model's configuration names no longest input


@suggests_names
class TorchModel(LanguageModel):
    """A transformers model in PyTorch that runs with sites captured and edits on, and generates text.

    Beside the sites of a decoder it has ``module:<path>`` and ``module_in:<path>``, any module's output or input.

    Args:
      model: a transformers causal language model.
      tokenizer: the model's own.
      source: where it came from.
      mesh: one device, on which edits are computed; None: the first one.

    Raises:
      UserError: the mesh has several devices.
    """

    def __init__(self, model: Any, tokenizer: Any, source: ModelSource, mesh: Mesh | None):
        mesh = mesh or make_mesh(devices=jax.devices()[:1])
        if mesh.size > 1:
            raise UserError(
                f"{source.name} runs in PyTorch, beside one device of JAX, but there are {mesh.size}: let JAX see one "
                "(JAX_CUDA_VISIBLE_DEVICES=0), or use a model of a JAX family"
            )
        self.hooked = HookedModel(model, device=own_device(mesh.devices.item()))
        config = _read_sizes(model, self.hooked.n_layers, longest_input(source))
        self._dtype = model.get_input_embeddings().weight.dtype
        # On the JAX side only the dtype of the parameters is asked for.
        params = dict(embed_VxD=jnp.zeros((0, config["d_model"]), str(self._dtype).removeprefix("torch.")))
        functions = TorchFunctions(self.hooked, config["context"])
        super().__init__(TorchConfig(**config, functions=functions), params, tokenizer, source, mesh)

    def __call__(
        self,
        tokens: Tokens,
        capture: Sequence[str | AnySite] | str | AnySite = (),
        edits: Sequence[Edit] = (),
        logits: bool = True,
    ) -> Output:
        """Run the model; see ``LanguageModel``. Sites may be modules, as in "module:model.layers.3.mlp"."""
        tokens = as_tokens(tokens, self.tokenizer)
        length = tokens.ids_BxT.shape[1]
        # Not beyond the context: models with learned positions have no more.
        padded = max(length, min(round_length(length), self.config.context))
        sites, edits = self._prepare(tokens, capture, edits, padded)
        ids_BxT = np.pad(tokens.ids_BxT, ((0, 0), (0, padded - length)))
        mask_BxT = np.arange(padded)[None] < tokens.lengths_B[:, None]
        position_BxT = np.where(mask_BxT, np.arange(padded, dtype=np.int32)[None], -1)
        pass_edits = _PassEdits(edits, self.mesh, position_BxT, tokens.lengths_B.astype(np.int32))
        values: dict[AnySite, jax.Array] = {}

        def visit(site: AnySite, value: torch.Tensor) -> torch.Tensor:
            value = pass_edits.apply(site, value)
            if site in sites:
                values[site] = jnp.array(_to_jax(value, self.mesh)[:, :length])  # a copy: models may add in place
            return value

        of_tokens = None
        if sites or logits:
            visited = {*sites, *pass_edits.sites}
            with torch.inference_mode():
                output = self.hooked.run(ids_BxT, mask_BxT, visited, visit, read_only=not logits)
            of_tokens = _to_jax(output.logits[:, :length].float(), self.mesh) if logits else None
        return Output(of_tokens, {str(site): values[site] for site in sites}, tokens, self.tokenizer)

    def _check_site(self, site: AnySite) -> None:
        """Raise a ``UserError`` unless the model has the site; see ``HookedModel.check``."""
        self.hooked.check(site)

    def _length_with_cache(self, tokens: Tokens) -> int:
        """Return the prompts' length as it is: the cache grows with new tokens."""
        return tokens.ids_BxT.shape[1]

    def _decode(
        self,
        tokens: Tokens,
        max_new_tokens: int,
        sampling: SamplingParams,
        condition: StopCondition,
        edits: tuple[Edit, ...],
    ) -> Iterator[np.ndarray]:
        """Yield the next token of every prompt, [B, 1]."""
        padded, cached = self._decoding
        lengths_B = tokens.lengths_B
        groups = [np.arange(len(lengths_B))] if padded else [np.flatnonzero(lengths_B == n) for n in set(lengths_B)]
        parts = [_Continuation(self, tokens, rows, edits, padded, cached) for rows in groups]
        order_B = np.argsort(np.concatenate(groups))
        for number in range(max_new_tokens):
            # Sampled together: a prompt's draws depend on its place in the batch.
            logits_BxV = _to_jax(torch.cat([part.read() for part in parts])[order_B].float(), self.mesh)
            next_Bx1 = np.asarray(sampling(logits_BxV, jnp.int32(number)))[:, None]
            decoding.check_finite(np.isfinite(np.asarray(logits_BxV.max(axis=-1))))
            yield next_Bx1
            for part in parts:
                part.append(next_Bx1)

    @functools.cached_property
    def _decoding(self) -> tuple[bool, bool]:
        """Return whether prompts are padded on the left, as transformers pads them, and whether the cache is used.

        It is measured before the first generation. Recurrent models may take padding into their state, misread a mask
        that is longer than the new tokens, or keep one state for all calls. Prompts of equal length run together then,
        without a mask, and where that fails, too, all their tokens run anew each time.
        """
        tolerance = parity.TOLERANCE[str(self._dtype).removeprefix("torch.")]
        with_padding = self._decoding_error(padded=True)
        if with_padding <= tolerance / 5:
            return True, True
        # Of deep models in bfloat16 rounding alone may be more than that.
        without = self._decoding_error(padded=False)
        return (with_padding < without, True) if min(with_padding, without) <= tolerance else (False, False)

    def _decoding_error(self, padded: bool) -> float:
        """Return the largest error of logits in four greedy steps of a ragged batch against whole passes, relative."""
        if padded and "attention_mask" not in self.hooked.accepted:
            return float("inf")
        prompts = pad([_PROBE_IDS, _PROBE_IDS[:1], _PROBE_IDS[1:2]])
        parts = [_Continuation(self, prompts, rows, (), padded) for rows in ([[0, 1, 2]] if padded else [[0], [1, 2]])]
        try:
            steps = []
            for _ in range(_PROBE_STEPS):
                steps.append(torch.cat([part.read() for part in parts]).float())
                for part in parts:
                    part.append(steps[-1].argmax(-1, keepdim=True).cpu().numpy())
        except Exception:  # of any type: some families cannot read their own cache
            return float("inf")
        logits_SxBxV = torch.stack(steps)
        errors = []
        for b, length in enumerate(prompts.lengths_B):
            ids = [*prompts.ids_BxT[b, :length], *logits_SxBxV[:-1, b].argmax(-1).tolist()]
            with torch.inference_mode():
                whole = (
                    self.hooked.run(np.array([ids]), None, (), lambda site, value: value)
                    .logits[0, length - 1 :]
                    .float()
                )
            errors.append(float((logits_SxBxV[:, b] - whole).abs().max() / whole.abs().max()))
        return float(np.max(errors))  # NaN is none that is accepted


class _Continuation:
    """Prompts that a model continues together.

    Args:
      model: the model.
      tokens: prompts of a batch.
      rows: indices of the prompts that are continued; of one length, unless they are padded.
      edits: of the whole batch.
      padded: whether prompts are padded on the left, and masked there.
      cached: whether what the model keeps of earlier tokens is used.
    """

    def __init__(
        self,
        model: TorchModel,
        tokens: Tokens,
        rows: Sequence[int] | np.ndarray,
        edits: Sequence[Edit],
        padded: bool,
        cached: bool = True,
    ):
        self._model, self._rows, self._padded, self._cached = model, np.asarray(rows), padded, cached
        chosen = Tokens(tokens.ids_BxT[self._rows], tokens.lengths_B[self._rows])
        self._lengths_R = chosen.lengths_B.astype(np.int32)
        self._ids_RxT, self._pad_R = chosen.pad_left(int(chosen.lengths_B.max()))
        self._edits = fit_values(edits, tokens.ids_BxT.shape, tokens.ids_BxT.shape[1], self._rows.tolist())
        self._past: dict[str, Any] = {}
        self._start = 0  # tokens before it are in what the model keeps

    def read(self) -> torch.Tensor:
        """Run the model on the tokens that it has not read; return the logits after the last one, [R, V]."""
        hooked, width, start = self._model.hooked, self._ids_RxT.shape[1], self._start
        position_RxT = np.maximum(np.arange(width, dtype=np.int32)[None] - self._pad_R[:, None], -1)
        options = dict(use_cache=self._cached, position_ids=hooked.tensor(np.maximum(position_RxT[:, start:], 0)))
        if not self._padded:
            options["attention_mask"] = None
        run = _PassEdits(self._edits, self._model.mesh, position_RxT[:, start:], self._lengths_R)
        with torch.inference_mode():
            output = hooked.run(
                self._ids_RxT[:, start:], position_RxT >= 0, run.sites, run.apply, **options, **self._past
            )
        name = next((name for name in _CACHES if output.get(name) is not None), None)
        if name and self._cached:  # without a cache, all positions run anew
            self._past, self._start = {name: output[name]}, width
        return output.logits[:, -1]

    def append(self, next_Bx1: np.ndarray) -> None:
        """Append the next token of each prompt of the batch."""
        self._ids_RxT = np.concatenate([self._ids_RxT, next_Bx1[self._rows]], axis=1)


class TorchFunctions:
    """Functions that ``torch_bridge`` calls: segments of a model on buffers of JAX.

    Args:
      model: the model.
      context: its longest input, in tokens; what stands beyond it is padding, whose values are 0.
    """

    def __init__(self, model: HookedModel, context: int):
        self._model, self._context = model, context

    @functools.cache  # noqa: B019 - one model lives as long as its functions
    def sites_of(self, layer: int, neurons: bool = False) -> tuple[Site, ...]:
        """Return the sites of a layer that are resolved, in their order; with or without the MLP's neurons."""
        if not layer and not self._layers_share_the_stream_alone():
            raise UserError(
                "the layers of this architecture hand on more than the residual stream: causal stages need another "
                "model, though calls with capture and edits work"
            )
        sites = []
        for site in (Site(kind, layer) for kind in ALL_KINDS if kind in KINDS or (neurons and kind == NEURONS)):
            with contextlib.suppress(UserError):  # a pass does not come by it once
                self._model.check(site)
                sites.append(site)
        return tuple(sites)

    @functools.cache  # noqa: B019 - one model lives as long as its functions
    def width(self, site: Site) -> int:
        """Return the width of a site."""
        return self._model.widths([site])[site]

    def embed(self, out: Sequence[Any], buffers: Sequence[Any]) -> None:
        """Write the stream entering layer 0."""
        ids = _tensor(buffers[0]).cpu().numpy()
        ids = ids.reshape(-1, ids.shape[-1])[:, : self._context]
        (values,) = self._visit(ids, (Site("resid_pre", 0),), {}, logits=False)
        self._write(out, [values])

    def run(self, segment: LayerSegment, out: Sequence[Any], buffers: Sequence[Any]) -> None:
        """Write what a segment gives."""
        with torch.inference_mode():
            self._write(out, self._segment(segment, self._read(buffers)))

    def run_backward(self, segment: LayerSegment, out: Sequence[Any], buffers: Sequence[Any]) -> None:
        """Write the gradients with regard to a segment's inputs; the last buffers are the cotangents."""
        count = 1 + len(segment.put)
        tensors = self._read(buffers)
        inputs = [tensor.requires_grad_() for tensor in tensors[:count]]
        with torch.enable_grad():
            pairs = zip(self._segment(segment, inputs), tensors[count:], strict=True)
            # An output that no input reaches has no graph, and autograd would refuse it.
            outputs, cotangents = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            slopes = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        self._write(out, [torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, slopes, strict=True)])

    def _segment(self, segment: LayerSegment, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run a segment on tensors; return the values of ``get`` and what leaves it."""
        # Any ids: what they are embedded to is replaced by the stream.
        ids = np.zeros(values[0].shape[:2], np.int32)
        put = dict(zip((Site("resid_pre", segment.start), *segment.put), values, strict=True))
        with self._model.skipping(segment.start):
            if segment.start:
                put[Site("resid_pre", 0)] = put.pop(Site("resid_pre", segment.start))
            leaving = () if segment.logits else (Site("resid_post", segment.stop - 1),)
            return self._visit(ids, (*segment.get, *leaving), put, segment.logits)

    def _visit(
        self, ids: np.ndarray, get: Sequence[Site], put: dict[Site, torch.Tensor], logits: bool
    ) -> list[torch.Tensor]:
        """Run the model with some sites' values put in; return other sites' values, and the logits if wanted."""
        values: dict[Site, torch.Tensor] = {}

        def visit(site: AnySite, value: torch.Tensor) -> torch.Tensor:
            assert isinstance(site, Site)
            value = put[site].to(value.device, copy=True) if site in put else value
            values[site] = value.clone()  # copies: models may add in place
            return value

        output = self._model.run(ids, None, {*get, *put}, visit, read_only=not logits)
        return [*(values[site] for site in get), *([output.logits.float()] if logits else [])]

    def _read(self, buffers: Sequence[Any]) -> list[torch.Tensor]:
        """Return copies of buffers on the model's device, as [N, T, D]."""
        whole = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in map(_tensor, buffers))
        return [tensor[:, : self._context].to(self._model.device, copy=True) for tensor in whole]

    def _write(self, out: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
        """Copy tensors to the buffers, zeros beyond the context."""
        for buffer, tensor in zip(out, tensors, strict=True):
            target = _tensor(buffer)
            target = target.view(-1, *target.shape[-2:])
            target[:, : self._context].copy_(tensor)
            target[:, self._context :].zero_()

    def _layers_share_the_stream_alone(self) -> bool:
        """Return whether the logits are the same when layers run one by one, on other token ids."""
        ids = np.arange(1, 9, dtype=np.int32)[None] % self._model.model.get_input_embeddings().weight.shape[0]
        with torch.inference_mode():
            (x,) = self._visit(ids, (Site("resid_pre", 0),), {}, logits=False)
            expected = self._visit(ids, (), {}, logits=True)[0]
            config: Any = None  # it is not asked for
            for layer in range(self._model.n_layers):
                (x,) = self._segment(LayerSegment(config, layer, layer + 1), [x])
            last = LayerSegment(config, self._model.n_layers, self._model.n_layers, logits=True)
            logits = self._segment(last, [x])[0]
        return bool((logits - expected).abs().max() <= 1e-2 * expected.abs().max())


class _PassEdits:
    """The edits of one forward pass.

    Args:
      edits: fitted to the prompts.
      mesh: where they are computed.
      position_BxT, prompt_B: as of ``ForwardPass``.

    Attributes:
      sites: where they act, and what they read.
    """

    def __init__(self, edits: Sequence[Edit], mesh: Mesh, position_BxT: np.ndarray, prompt_B: np.ndarray):
        self._edits, self._mesh = edits, mesh
        self._where = jax.device_put((position_BxT, prompt_B), sharding(mesh))
        self._reads = {edit.reads for edit in edits if getattr(edit, "reads", edit.site) != edit.site}  # type: ignore
        self._values: dict[AnySite, jax.Array] = {}
        self._unedited: dict[AnySite, jax.Array] = {}
        self.sites: set[AnySite] = {edit.site for edit in edits} | self._reads

    def apply(self, site: AnySite, value: torch.Tensor) -> torch.Tensor:
        """Return the value of a site after the edits there; the same tensor where there are none."""
        edits = [edit for edit in self._edits if edit.site == site]
        if site in self._reads:
            self._unedited[site] = jnp.array(_to_jax(value, self._mesh))
        if edits:
            unedited = changed = _to_jax(value, self._mesh)
            for edit in edits:
                reads = getattr(edit, "reads", site)
                read = None if reads == site else (self._values[reads], self._unedited[reads])
                changed = _apply_edit(edit, changed, unedited, read, *self._where)
            changed.block_until_ready()  # it may read memory that torch writes next
            value = torch.from_dlpack(changed).to(value.device)
        if site in self._reads:
            self._values[site] = jnp.array(_to_jax(value, self._mesh)) if edits else self._unedited[site]
        return value


@jax.jit
def _apply_edit(
    edit: Edit,
    value: jax.Array,
    unedited: jax.Array,
    read: tuple[jax.Array, jax.Array] | None,
    position_BxT: jax.Array,
    prompt_B: jax.Array,
) -> jax.Array:
    """Apply an edit; ``read`` is the value of the site that it reads, if that is another, after and before edits."""
    run = ForwardPass(position_BxT, prompt_B, unedited={edit.site: unedited})
    if read is not None:
        run.values[edit.reads], run.unedited[edit.reads] = read  # type: ignore[attr-defined]
    return edit(value, run)


def _tensor(buffer: Any) -> torch.Tensor:
    """Return a buffer or array as a tensor in the same memory."""
    if isinstance(buffer, np.ndarray) and buffer.dtype == jnp.bfloat16:
        return torch.from_numpy(buffer.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(buffer)


def _to_jax(value: torch.Tensor, mesh: Mesh) -> jax.Array:
    """Return a tensor as an array on the mesh's device, in the same memory where it is there."""
    if mesh.devices.item().platform == "cpu":
        value = value.cpu()  # JAX without GPUs does not know the device of a tensor there
    return jax.device_put(jnp.from_dlpack(value.detach().contiguous()), sharding(mesh))


def _read_sizes(model: Any, n_layers: int, context: int | None) -> dict[str, Any]:
    """Return the fields of ``TorchConfig`` that a transformers model's configuration says; see ``DecoderConfig``."""
    config = model.config.get_text_config()

    def first(*names: str, default: int) -> int:
        """Return the first of some fields that holds a whole number."""
        for name in names:
            with contextlib.suppress(RuntimeError):  # of a size that differs between layers (Gemma 4)
                if isinstance(value := getattr(config, name, None), int):
                    return value
        return default

    d_model, n_heads = config.hidden_size, first("num_attention_heads", default=1)
    formulas: dict[str, Any] = dict(tied=False, norm="", norm_eps=0.0, activation="", gated=False, score_scale=1.0)
    return formulas | dict(
        family=model.config.model_type,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=first("num_key_value_heads", "num_kv_heads", default=n_heads),
        d_head=first("head_dim", default=d_model // n_heads),
        d_mlp=first("intermediate_size", "ffn_dim", "n_inner", default=4 * d_model),
        vocab=first("vocab_size", default=model.get_input_embeddings().weight.shape[0]),
        context=context or _NO_LIMIT,
    )
