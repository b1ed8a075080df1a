"""Mixtures of experts (Shazeer et al., 2017): for each token a router chooses some of a layer's MLPs.

1. The router gives each of N tokens K of E experts, and their shares of its output.
2. The N * K pairs of token and expert are sorted by expert, and each expert's pairs fill up whole blocks of rows.
3. A loop runs one block after the other through the MLP of its expert, whose matrices it reads out of all layers'.
4. Each token adds up its K outputs, times their shares.

A program's shapes are fixed, so there are blocks for the worst case, and no pair is ever dropped. Blocks are so small
that fillers are at most a quarter of the pairs, on every backend. (``jax.lax.ragged_dot`` would do without fillers, but
on CPUs it multiplies each row by every expert.) On a mesh each device takes these steps for its
own prompts, and its part of the experts' hidden width.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from saejax.models.config import DecoderConfig, RunRules
from saejax.models.layers import at_least_float32, layer_of, mlp, project_float32
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import BY_DOCUMENT, fitting_spec, mesh_of

# Parameters of an expert, and of all: matrices, and biases where a family has them.
_MATRICES = {"gate_DxF": "gate_ExDxF", "up_DxF": "up_ExDxF", "down_FxD": "down_ExFxD"}
_BIASES = {"gate_bias_F": "gate_bias_ExF", "up_bias_F": "up_bias_ExF", "down_bias_D": "down_bias_ExD"}
_FILLER = 0.25  # most rows of blocks without a pair, as a share of the pairs
_ALIGNED = 8  # rows of a block are a multiple of it, where there are as many: of registers, and of a TPU's tiles
_LARGEST = 256  # rows of a block, with which its products are as fast as they get


def mix_experts(
    config: DecoderConfig, rules: RunRules, params: Mapping[str, Any], layer: int | jax.Array, x_xTxD: jax.Array
) -> jax.Array:
    """Return the mean of the chosen experts' outputs for the normalised stream x, weighted by the router, [..., T, D].

    ``params`` are the decoder's, all layers stacked, so that the matrices of the ``layer`` are read where they are.
    """
    router_DxE = layer_of(params[f"{LAYERS}router_DxE"], layer)
    bias_E = layer_of(params[f"{LAYERS}router_bias_E"], layer) if config.mlp_bias else None
    logits_xTxE = project_float32("...td,de->...te", x_xTxD, router_DxE, bias_E)
    # The router's choice is constant under the rules, as attention weights are.
    logits_xTxE = rules.factor(logits_xTxE)
    names = _MATRICES | (_BIASES if config.mlp_bias else {})
    matrices = {name: params[LAYERS + stacked] for name, stacked in names.items()}
    run = functools.partial(_run_experts, config, rules)
    mesh = mesh_of(matrices["up_DxF"])
    if mesh.size > 1:
        table, sizes = parameter_table(config), dict(mesh.shape)
        # As ``weights.load_params`` places the parameters, and every pass its prompts.
        specs = {
            name: PartitionSpec(*fitting_spec(sizes, matrices[name].shape, *table[LAYERS + stacked][1]))
            for name, stacked in names.items()
        }
        whole = [None] * (x_xTxD.ndim - 1)
        by_prompt = PartitionSpec(*fitting_spec(sizes, x_xTxD.shape, BY_DOCUMENT if len(whole) > 1 else None, *whole))
        run = functools.partial(run, split="model" in tuple(specs["up_DxF"]))
        in_specs = (specs, PartitionSpec(), by_prompt, by_prompt)
        # Compiled as one, as outside of a program the mesh of an array's type has no devices.
        run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=by_prompt))
    return run(matrices, jnp.asarray(layer), x_xTxD, logits_xTxE).astype(x_xTxD.dtype)


def block_shape(pairs: int, experts: int) -> tuple[int, int]:
    """Return the number of blocks, enough for any choice of the router, and their rows.

    Args:
      pairs: number of pairs of a token and an expert.
      experts: number of experts.
    """
    used = min(pairs, experts)
    rows = min(1 + int(_FILLER * pairs / used), _LARGEST)
    if rows > _ALIGNED:
        rows -= rows % _ALIGNED
    # An expert with n pairs takes ceil(n / rows) blocks, at most (n + rows - 1) / rows.
    return (pairs + used * (rows - 1)) // rows, rows


def _run_experts(
    config: DecoderConfig,
    rules: RunRules,
    matrices: Mapping[str, jax.Array],
    layer: jax.Array,
    x_xTxD: jax.Array,
    logits_xTxE: jax.Array,
    split: bool = False,
) -> jax.Array:
    """Compute ``mix_experts`` from the router's logits on, in at least float32.

    With ``split`` the experts' hidden width is split over ``model``.
    """
    x_NxD = x_xTxD.reshape(-1, x_xTxD.shape[-1])
    share_xTxK, expert_xTxK = lax.top_k(jax.nn.softmax(logits_xTxE, axis=-1), config.experts_per_token)
    if config.normalize_experts:
        share_xTxK = share_xTxK / jnp.sum(share_xTxK, axis=-1, keepdims=True)
    share_NxK = share_xTxK.astype(x_NxD.dtype).reshape(len(x_NxD), -1)
    down_bias = matrices.get("down_bias_D")
    # One dimension for both.
    stacks = {name: stack.reshape(-1, *stack.shape[2:]) for name, stack in matrices.items() if stack is not down_bias}
    pair_R, row_X, expert_C = _sort_pairs(expert_xTxK.reshape(-1), config.n_experts)
    rows_CxWxD = x_NxD[pair_R // config.experts_per_token].reshape(len(expert_C), -1, x_NxD.shape[-1])

    # As for a layer: a gradient keeps products, but no block's matrices.
    @functools.partial(jax.checkpoint, policy=rules.remat_policy, prevent_cse=False)
    def run_block(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        """Run a block of rows through its expert."""
        expert, rows_WxD = block
        weights = {name: layer_of(stack, layer * config.n_experts + expert) for name, stack in stacks.items()}
        return None, mlp(config, rules, weights, rows_WxD)

    out_RxD = lax.scan(run_block, None, (expert_C, rows_CxWxD))[1].reshape(-1, x_NxD.shape[-1])
    exact = at_least_float32(x_NxD)
    out_NxKxD = out_RxD[row_X].reshape(*share_NxK.shape, -1).astype(exact)
    total_NxD = jnp.sum(share_NxK.astype(exact)[..., None] * out_NxKxD, axis=1)
    total_NxD = lax.psum(total_NxD, "model") if split else total_NxD
    if down_bias is not None:  # once, not on each device of ``model``
        bias_NxKxD = layer_of(down_bias, layer)[expert_xTxK.reshape(share_NxK.shape)].astype(exact)
        total_NxD = total_NxD + jnp.sum(share_NxK.astype(exact)[..., None] * bias_NxKxD, axis=1)
    return total_NxD.reshape(x_xTxD.shape)


def _sort_pairs(expert_X: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort pairs of a token and an expert into blocks of rows, each of one expert.

    With experts 1, 0, 1 of three pairs and blocks of two rows, rows hold the pairs 1, -, 0, 2.

    Args:
      expert_X: the expert of each pair.
      experts: number of experts.

    Returns:
      The pair of each row, 0 for fillers; the row of each pair; and the expert of each block.
    """
    pairs = len(expert_X)
    blocks, size = block_shape(pairs, experts)
    order_X = jnp.argsort(expert_X)
    sorted_X = expert_X[order_X]
    count_E = jnp.bincount(expert_X, length=experts)
    blocks_E = -(-count_E // size)
    first_pair_E, first_row_E = jnp.cumsum(count_E) - count_E, size * (jnp.cumsum(blocks_E) - blocks_E)
    place_X = first_row_E[sorted_X] + jnp.arange(pairs) - first_pair_E[sorted_X]
    pair_R = jnp.zeros(blocks * size, order_X.dtype).at[place_X].set(order_X)
    row_X = jnp.zeros_like(place_X).at[order_X].set(place_X)
    expert_C = jnp.repeat(jnp.arange(experts), blocks_E, total_repeat_length=blocks)
    return pair_R, row_X, expert_C
