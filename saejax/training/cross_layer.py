"""Training a cross-layer transcoder: a stack with a member for every layer, whose members minimise one loss.

    loss = sum over layers of (squared error of what is written to it + penalty of its kind, and its further terms
                               + auxk * AuxK of what is written to it)

With ``batchtopk.across_layers`` the B k L largest activations of a batch are kept in all L layers together, k for each
token and layer on average (BatchTopK of open-source cross-layer transcoders, 2025); one threshold for all layers stands
for them afterwards, because a layer of a model that runs cannot know the features of later ones.

In the AuxK loss the top dead features of every layer write to their own and all later layers, and what they write to a
layer reconstructs its residual, a constant (after Gao et al., 2024).

Everything else is as in any stack: inputs, scales, seeds, metrics of each member. Every layer's gradient is clipped by
itself. Training starts from a stack of transcoders, with nothing written to later layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries import Dictionary, DictionaryConfig, losses, rescale, sparsity
from saejax.dictionaries.cross_layer import joined_lengths, sum_writes
from saejax.dictionaries.kinds.base import Arrays, EncodedBatch, EncoderInputs
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import lowest_level, row
from saejax.training.optimizer import penalty_schedule
from saejax.training.stack import Hyperparams, TrainStack
from saejax.training.state import PER_MEMBER, TrainState, apply_update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayersBatch:
    """A batch of all layers, and what else their loss depends on besides their arrays; see ``step.MemberBatch``."""

    #: x_LxBxD and y_LxBxD: scaled inputs and targets.
    x_LxBxD: jax.Array
    y_LxBxD: jax.Array
    hyper: Hyperparams  #: hyperparameters of the layers
    step: jax.Array  #: number of steps done
    dead_LxF: jax.Array  #: True for features that have been silent for too long


def scale_values(stack: TrainStack, hyper: Hyperparams, batch: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the inputs of a batch and, if they are there, the targets, [L, B, D] each, in the units of training."""
    # Losses are sums over layers of scaled values: layers with large norms would else dominate.
    scales = hyper.input_scale, hyper.output_scale
    return [
        values_LxBxD.astype(stack.config.state_dtype) * scale_L[:, None, None]
        for values_LxBxD, scale_L in zip(batch, scales, strict=False)
    ]


def train_step(
    stack: TrainStack, state: TrainState, hyper: Hyperparams, batch: tuple[jax.Array, ...]
) -> tuple[TrainState, Arrays]:
    """Do one step of all layers; see ``step.train_step``."""
    x_LxBxD, y_LxBxD = scale_values(stack, hyper, batch)
    dead_LxF = state.silent_MxF >= stack.config.dead_tokens
    gradient = jax.grad(functools.partial(cross_layer_loss, stack), has_aux=True)
    of_layers = LayersBatch(x_LxBxD, y_LxBxD, hyper, state.step_M[0], dead_LxF)
    grads, (metrics, fired_LxF) = gradient(state.params, of_layers)
    tokens = x_LxBxD.shape[1]
    # Layers differ in the width of their decoders, so their updates cannot be one vectorised call.
    updated = [
        apply_update(stack, state.layer(layer), grads[layer], fired_LxF[layer], rate, tokens)
        for layer, rate in enumerate(hyper.learning_rate)
    ]
    states, update_metrics = zip(*updated, strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *update_metrics)
    rest = {name: jnp.stack([getattr(layer, name) for layer in states]) for name in PER_MEMBER}
    after = TrainState(tuple(layer.params for layer in states), tuple(layer.optimizer for layer in states), **rest)
    return after, metrics | stacked


def cross_layer_loss(
    stack: TrainStack, layers: Sequence[Arrays], batch: LayersBatch
) -> tuple[jax.Array, tuple[Arrays, jax.Array]]:
    """Return the loss of all layers together on one batch.

    Args:
      stack: what is trained.
      layers: arrays of each layer, "W_dec_FxD" as wide as all that it writes.
      batch: the tokens of the step.

    Returns:
      The loss, and (metrics [L], whether each feature fired on any token).
    """
    config, kind, hyper = stack.config, stack.kind, batch.hyper
    x_LxBxD, y_LxBxD, dead_LxF = batch.x_LxBxD, batch.y_LxBxD, batch.dead_LxF
    settings, decoders = config.of_kind(kind.name), [arrays["W_dec_FxD"] for arrays in layers]
    dead_k = (config.auxk_features or max(stack.dictionary.d_out // 2, 1)) if config.auxk else 0

    def encode(layer: Any) -> tuple[jax.Array, jax.Array, Arrays]:
        arrays, norms_F, x_BxD, values, dead_F = layer
        encoder, encoder_inputs, f_BxF = _encode_layer(stack, arrays, norms_F, x_BxD, values, config.matmul)
        encoded = EncodedBatch(encoder, x_BxD, x_BxD, encoder_inputs.pre_xF, f_BxF, dead_F, None, values, settings)
        penalty, terms = kind.penalty(encoded), kind.losses(encoded)
        terms |= {} if penalty is None else dict(sparsity=penalty * penalty_schedule(config, stack.steps)(batch.step))
        of_dead = jnp.zeros(0)
        if config.auxk:
            of_dead = sparsity.topk(jnp.where(dead_F[None], encoder_inputs.pre_xF, 0.0), dead_k)
        return f_BxF, of_dead, terms

    layer_inputs = _encoders(stack, layers), joined_lengths(decoders), x_LxBxD, hyper.kind_params, dead_LxF
    # One layer after the other on a CPU, where batched products are slower than their parts.
    map_layers = (lambda args: lax.map(encode, args)) if stack.platform == "cpu" else jax.vmap(encode)
    f_LxBxF, of_dead, terms = map_layers(layer_inputs)
    f_LxBxF = _keep_largest(stack, f_LxBxF, hyper)
    firings_LxF = jnp.sum((f_LxBxF > 0).astype(jnp.float32), axis=1)

    # What a layer is given is the sum over all layers below, so errors need all activations first.
    error_LxBxD = y_LxBxD - _predict(stack, layers, f_LxBxF, x_LxBxD, config.matmul)
    mse_L = jax.vmap(losses.squared_size)(error_LxBxD)
    terms = dict(error=mse_L) | terms
    if config.auxk:
        share = jnp.minimum(jnp.sum(dead_LxF) / (len(layers) * dead_k), 1.0).astype(mse_L.dtype)

        def explain(dead_LxBxF: jax.Array) -> jax.Array:
            written_LxBxD = sum_writes(dead_LxBxF, decoders, stack.mesh, config.matmul)
            return jax.vmap(losses.squared_size)(lax.stop_gradient(error_LxBxD) - written_LxBxD)

        explained_L = lax.cond(jnp.any(dead_LxF), explain, lambda _: jnp.zeros_like(mse_L), of_dead)
        terms["auxk"] = config.auxk * share * explained_L
    loss_L = sum(terms.values(), jnp.zeros_like(mse_L))
    metrics = terms | dict(
        loss=loss_L,
        mse=mse_L,
        l0=jnp.sum(firings_LxF, axis=1) / x_LxBxD.shape[1],
        explained_variance=jax.vmap(losses.explained_variance)(y_LxBxD, error_LxBxD),
    )
    return jnp.sum(loss_L), (metrics, firings_LxF > 0)


def _encoders(stack: TrainStack, layers: Sequence[Arrays]) -> Arrays:
    """Return the arrays that encode, stacked over layers."""
    names = ("W_enc_DxF", "b_enc_F", *stack.kind.vectors)
    return {name: jnp.stack([arrays[name] for arrays in layers]) for name in names}


def _encoder_inputs(
    stack: TrainStack, arrays: Arrays, norms_F: jax.Array, x_BxD: jax.Array, matmul_dtype: str
) -> tuple[Dictionary, EncoderInputs]:
    """Return a layer's encoder, and the inputs of its kind, [B, ...]."""
    encoder = Dictionary(stack.dictionary, matmul_dtype, **arrays, decoder_norms_F=norms_F)
    projected_BxF = matmul(x_BxD, arrays["W_enc_DxF"], matmul_dtype)
    return encoder, EncoderInputs(x_BxD, projected_BxF, projected_BxF + row(arrays["b_enc_F"], 2))


def _encode_layer(
    stack: TrainStack, arrays: Arrays, norms_F: jax.Array, x_BxD: jax.Array, values: Any, matmul_dtype: str
) -> tuple[Dictionary, EncoderInputs, jax.Array]:
    """Return a layer's encoder, the inputs of its kind, and activations [B, F], of which ``_keep_largest`` keeps some.

    For the arguments see ``_encoder_inputs``; ``values`` are its hyperparameters of the kind.
    """
    encoder, encoder_inputs = _encoder_inputs(stack, arrays, norms_F, x_BxD, matmul_dtype)
    if _is_across_layers(stack):
        return encoder, encoder_inputs, jax.nn.relu(encoder_inputs.pre_xF)
    settings = stack.config.of_kind(stack.kind.name)
    return encoder, encoder_inputs, stack.kind.encode_in_training(encoder, encoder_inputs, values, settings)


def _is_across_layers(stack: TrainStack) -> bool:
    """Return whether layers share the features that are kept of a batch."""
    return stack.kind.name == "batchtopk" and stack.config.of_kind("batchtopk").across_layers


def _keep_largest(stack: TrainStack, f_LxBxF: jax.Array, hyper: Hyperparams) -> jax.Array:
    """Return activations of all layers, the largest of them alone where layers share those that are kept."""
    if not _is_across_layers(stack):
        return f_LxBxF
    # The tokens of all layers as one batch: all have one k.
    of_all_XxF = f_LxBxF.reshape(-1, f_LxBxF.shape[-1])
    return sparsity.batch_topk(of_all_XxF, hyper.kind_params["k"][0]).reshape(f_LxBxF.shape)


def _predict(
    stack: TrainStack, layers: Sequence[Arrays], f_LxBxF: jax.Array, x_LxBxD: jax.Array, matmul_dtype: str
) -> jax.Array:
    """Return the prediction of every layer's target, [L, B, D]."""
    bias_LxD = jnp.stack([arrays["b_dec_D"] for arrays in layers])
    written_LxBxD = sum_writes(f_LxBxF, [arrays["W_dec_FxD"] for arrays in layers], stack.mesh, matmul_dtype)
    predicted_LxBxD = written_LxBxD + bias_LxD[:, None]
    if not stack.dictionary.skip:
        return predicted_LxBxD
    skips = [matmul(x_BxD, arrays["W_skip_DxD"], matmul_dtype) for x_BxD, arrays in zip(x_LxBxD, layers, strict=True)]
    return predicted_LxBxD + jnp.stack(skips)


def find_levels(stack: TrainStack, layers: Sequence[Arrays], hyper: Hyperparams, x_LxBxD: jax.Array) -> jax.Array:
    """Return the level [L] above which each layer keeps activations of a batch of scaled inputs; 0: it keeps none."""

    def of_layer(layer: Any) -> jax.Array:
        arrays, norms_F, x_BxD, values = layer
        # In float32, as finished dictionaries are read.
        _, encoder_inputs, f_BxF = _encode_layer(stack, arrays, norms_F, x_BxD, values, "float32")
        return f_BxF if _is_across_layers(stack) else lowest_level(f_BxF, encoder_inputs.pre_xF)

    norms_LxF = joined_lengths([arrays["W_dec_FxD"] for arrays in layers])
    of_layers = lax.map(of_layer, (_encoders(stack, layers), norms_LxF, x_LxBxD, hyper.kind_params))
    if _is_across_layers(stack):
        return jnp.full(len(layers), lowest_level(_keep_largest(stack, of_layers, hyper), of_layers))
    return of_layers


def held_out_sums(
    stack: TrainStack,
    layers: Sequence[Arrays],
    hyper: Hyperparams,
    kept_L: jax.Array,
    x_LxBxD: jax.Array,
    y_LxBxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return squared errors [L] of a batch, and the number of tokens on which features fire [L, F], as at inference.

    Args:
      stack: what is trained.
      layers: arrays of each layer.
      hyper: hyperparameters of the layers.
      kept_L: result of ``thresholds.Calibration``; 0 for kinds that make nothing of it.
      x_LxBxD: scaled inputs.
      y_LxBxD: scaled targets.
    """
    kind = stack.kind

    def encode(layer: Any) -> jax.Array:
        arrays, norms_F, x_BxD, values, kept = layer
        finished = kind.finish(arrays, kept)
        encoder, encoder_inputs = _encoder_inputs(stack, finished, norms_F, x_BxD, "float32")
        return kind.encode(encoder, encoder_inputs, values)

    norms_LxF = joined_lengths([arrays["W_dec_FxD"] for arrays in layers])
    f_LxBxF = lax.map(encode, (_encoders(stack, layers), norms_LxF, x_LxBxD, hyper.kind_params, kept_L))
    error_LxBxD = y_LxBxD - _predict(stack, layers, f_LxBxF, x_LxBxD, "float32")
    fired_LxF = jnp.sum((f_LxBxF > 0).astype(jnp.float32), axis=1)
    return jnp.sum(jnp.square(error_LxBxD), axis=(1, 2)).astype(jnp.float32), fired_LxF


def finish_layer(stack: TrainStack, state: TrainState, layer: int, kept_L: Any = None) -> tuple[Dictionary, jax.Array]:
    """Return a layer's trained dictionary for raw activations, and what its features write.

    All processes must call this together.

    Args:
      stack: what was trained.
      state: the state.
      layer: the layer.
      kept_L: result of ``thresholds.Calibration``; None: 0.

    Returns:
      The layer alone, with the decoder to its own layer; and the decoders to each layer from its own on, [F, X, D].
    """
    config, arrays = _unscale(stack, state, layer, 0.0 if kept_L is None else kept_L[layer])
    writes_FxXxD = arrays["W_dec_FxD"].reshape(config.n_features, -1, config.d_in)
    return Dictionary(config, stack.config.matmul, **arrays | dict(W_dec_FxD=writes_FxXxD[:, 0])), writes_FxXxD


def _unscale(stack: TrainStack, state: TrainState, layer: int, kept: Any) -> tuple[DictionaryConfig, Arrays]:
    """Return what a layer is (a JumpReLU where its kind can be one), and its arrays for raw activations.

    Rows of the joined decoders have length 1.
    """
    kind, block, scales = stack.kind, state.layer(layer), stack.scales
    arrays = kind.finish(block.params, kept)
    arrays = rescale.fold_input_scaling(kind, arrays, scales[layer].input, scales[layer].output)
    # Each layer's outputs have their own scale, and activations the scale of the layer that they come from.
    factors = [scales[layer].output / scale.output for scale in scales[layer:]]
    factor_X = np.repeat(np.array(factors, stack.config.state_dtype), stack.dictionary.d_in)
    arrays = rescale.unit_rows(kind, arrays | dict(W_dec_FxD=arrays["W_dec_FxD"] * factor_X[None]))
    member, scale = stack.members[layer], scales[layer]
    config = dataclasses.replace(
        stack.dictionary,
        site=member.site,
        target=member.target,
        k=0,
        max_norm=scale.max_norm,
        target_max_norm=scale.target_max_norm,
    )
    # circuit-tracer reads JumpReLU alone; a threshold says the same of BatchTopK at inference.
    if kind.jumprelu:
        config, arrays = dataclasses.replace(config, kind="jumprelu"), kind.as_jumprelu(arrays)
    return config, arrays
