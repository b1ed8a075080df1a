"""Fused attention: the kernels of GPUs and TPUs, which keep no scores in memory.

``select_kernel`` says which of them can compute a pass: cuDNN's flash attention on NVIDIA GPUs, the splash kernel on
TPUs. Both know the decoder's masks (causal, with or without a window) and one scale for all layers. Where scores or
weights are edited, read or differentiated by other rules, and on CPUs, ``attention.attend`` computes them.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from saejax.models.attention import CausalMask, TablesByLayer
from saejax.models.config import DecoderConfig, RunRules
from saejax.parallel.mesh import BY_DOCUMENT, fitting_spec

_CUDNN = "cudnn"  # the implementation of ``jax.nn.dot_product_attention``
_INTERPRETED = False  # whether the splash kernel is interpreted, on a CPU
_SHORTEST = 128  # tokens of a prompt below which scores are few, and of a block of the splash kernel
_BLOCKS = (512, 256, 128)  # tokens of a block of the splash kernel, the largest first that divides a prompt


def select_kernel(
    platform: str,
    capability: float,
    dtype: Any,
    config: DecoderConfig,
    rules: RunRules,
    length: int,
    model_devices: int = 1,
) -> str | None:
    """Return the kernel for attention among the tokens of prompts: "cudnn", "splash", or None for ``attention.attend``.

    Args:
      platform: of the devices: "cpu", "gpu" or "tpu".
      capability: compute capability of NVIDIA GPUs, such as 9.0; 0 for other devices.
      dtype: of queries, keys and values.
      config: the decoder.
      rules: rules of differentiation.
      length: tokens of each prompt, padding included.
      model_devices: devices over which heads are split.
    """
    # Derivatives of fused kernels are backward and of first order alone, of the function itself.
    if rules.backward != "gradient" or rules.first_fixes:
        return None
    # A window of its own for each layer is known, a scale is not, and neither are sinks.
    if config.scale_by_layer or config.attn_sinks or length < _SHORTEST or config.n_kv_heads % model_devices:
        return None
    if dtype not in (jnp.bfloat16, jnp.float16):  # float32 would be multiplied in less precision
        return None
    if platform == "gpu" and capability >= 8:
        widest = 256 if capability >= 9 else 128
        fits = config.d_head % 8 == 0 and config.d_head <= widest and config.attn_logit_softcap is None
        return "cudnn" if fits else None
    if platform == "tpu":
        return "splash" if config.d_head % 128 == 0 and length % _SHORTEST == 0 else None
    return None


def find_kernel(config: DecoderConfig, rules: RunRules, mesh: AbstractMesh, x_xTxD: jax.Array) -> str | None:
    """Return the kernel for a stream on the devices of a mesh, or on JAX's first device; see ``select_kernel``."""
    device = mesh.abstract_device if mesh.size else None
    platform = device.platform if device else jax.default_backend()
    stated = getattr(jax.local_devices()[0], "compute_capability", "")  # "gfx90a" of an AMD GPU
    capability = float(stated) if platform == "gpu" and re.fullmatch(r"\d+\.\d+", stated) else 0.0
    devices = mesh.shape.get("model", 1) if mesh.size else 1
    return select_kernel(platform, capability, x_xTxD.dtype, config, rules, x_xTxD.shape[-2], devices)


def attend_fused(
    kernel: str,
    config: DecoderConfig,
    mesh: AbstractMesh,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    tables: TablesByLayer,
    layer: int | jax.Array,
) -> jax.Array:
    """Return what ``attention.attend`` computes of queries [..., T, H, K], and of keys and values [..., T, N, K].

    Args:
      kernel: by ``select_kernel``.
      config: the decoder.
      mesh: the devices.
      qkv: queries and keys after the rotary embedding, and values.
      tables: of whole prompts, from ``attention.whole_prompt_tables``.
      layer: the layer's number.
    """
    windows = []
    for mask in (tables.full.mask, tables.sliding.mask):
        assert isinstance(mask, CausalMask) and isinstance(mask.window, int)
        windows.append(mask.window)
    run = functools.partial(dict(cudnn=_run_cudnn, splash=_run_splash)[kernel], config)
    full, sliding = (functools.partial(_on_devices, functools.partial(run, window=window), mesh) for window in windows)
    if not any(config.sliding_layers) or windows[0] == windows[1]:
        return full(*qkv)
    if all(config.sliding_layers):
        return sliding(*qkv)
    # Kernels need to know their window, and so there is one for each, of which a layer runs its own.
    return lax.cond(jnp.array(config.sliding_layers)[layer], sliding, full, *qkv)


def _on_devices(run: Any, mesh: AbstractMesh, *qkv: jax.Array) -> jax.Array:
    """Run a kernel on each device's prompts and heads: the compiler cannot split a kernel."""
    if mesh.size <= 1:
        return run(*qkv)
    specs = tuple(PartitionSpec(*fitting_spec(mesh.shape, x.shape, *_axes(x.ndim))) for x in qkv)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False))(*qkv)


def _axes(ndim: int) -> list[Any]:
    """Return the mesh axes of queries, keys or values: of prompts, if there are several, and of heads."""
    return [BY_DOCUMENT if ndim > 3 else None, *[None] * (ndim - 3), "model", None]


def _run_cudnn(
    config: DecoderConfig, q_xTxHxK: jax.Array, k_xTxNxK: jax.Array, v_xTxNxK: jax.Array, window: int
) -> jax.Array:
    """Attend with cuDNN's kernel."""
    q_BxTxHxK, k_BxTxNxK, v_BxTxNxK = (x.reshape(-1, *x.shape[-3:]) for x in (q_xTxHxK, k_xTxNxK, v_xTxNxK))
    # It counts the tokens before the query's own.
    before = (window - 1, 0) if window < q_xTxHxK.shape[-3] else None
    choices: dict[str, Any] = dict(is_causal=True, local_window_size=before, implementation=_CUDNN)
    out_BxTxHxK = jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxNxK, v_BxTxNxK, scale=config.score_scale, **choices)
    return out_BxTxHxK.reshape(q_xTxHxK.shape)


def _run_splash(
    config: DecoderConfig, q_xTxHxK: jax.Array, k_xTxNxK: jax.Array, v_xTxNxK: jax.Array, window: int
) -> jax.Array:
    """Attend with the splash kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q_xTxHxK.shape[-3:-1]
    mask = masks.CausalMask((length, length))
    if window < length:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)  # it counts the tokens before the query's own
    size = next(size for size in _BLOCKS if length % size == 0)
    sizes = splash.BlockSizes(
        **dict(block_q=size, block_kv=size, block_q_dq=size, block_kv_dq=size, block_q_dkv=size, block_kv_dkv=size)
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=config.attn_logit_softcap,
        interpret=_INTERPRETED,
    )
    scaled_xTxHxK = (q_xTxHxK.astype(jnp.float32) * config.score_scale).astype(q_xTxHxK.dtype)
    heads_first = (jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2) for x in (scaled_xTxHxK, k_xTxNxK, v_xTxNxK))
    out_BxHxTxK = jax.vmap(kernel)(*heads_first)
    return jnp.swapaxes(out_BxHxTxK, 1, 2).reshape(q_xTxHxK.shape)
