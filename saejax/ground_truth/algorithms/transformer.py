"""The transformer of an algorithm: Llama's architecture, trained with the project's decoder, saved for any tool."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saejax.ground_truth.algorithms.questions import Questions
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.decoder import run_layers
from saejax.models.families import FAMILIES
from saejax.models.families.table import linear, linear_of_heads
from saejax.models.parameters import LAYERS, parameter_table

HEADS = 4
_BATCH = 500  # questions of a forward pass that measures accuracy
Params = dict[str, jax.Array]


def make_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Return AdamW.

    Args:
      steps: number of steps.
      learning_rate: the largest; it rises over a twentieth of the steps and then falls to 0 as a cosine.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(steps // 20, 1), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


def describe(words: int, context: int, layers: int, width: int) -> dict[str, Any]:
    """Return the fields of ``config.json``.

    Args:
      words: size of the vocabulary.
      context: number of positions.
      layers: number of layers.
      width: of the residual stream, which four heads with rotary embeddings share.
    """
    return dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=context,
        rope_theta=100.0,
        tie_word_embeddings=False,
        vocab_size=words,
    )


def initial(config: DecoderConfig, seed: int) -> Params:
    """Return random weights: norms 1, all others normal with variance 1 / (number of inputs)."""
    params = {}
    for number, (name, (shape, _)) in enumerate(parameter_table(config).items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        layer_shape = shape[1:] if name.startswith(LAYERS) else shape
        fan_in = layer_shape[0] * layer_shape[1] if name.endswith("o_HxKxD") else layer_shape[0]
        fan_in = config.d_model if "embed" in name else fan_in
        params[name] = jnp.ones(shape) if "norm" in name else jax.random.normal(key, shape) * fan_in**-0.5
    return params


@functools.partial(jax.jit, static_argnums=0)
def answer_logits(config: DecoderConfig, params: Params, ids_BxT: jax.Array, place_BxN: jax.Array) -> jax.Array:
    """Return the logits of ``ids_BxT`` at the answers' positions ``place_BxN``, [B, N, V]."""
    x_BxTxD = run_layers(config, params, decoder.embed(config, params, ids_BxT), 0, config.n_layers).x
    x_BxNxD = jnp.take_along_axis(x_BxTxD, place_BxN[..., None], axis=1)
    return decoder.unembed(config, params, x_BxNxD)


def trainer(
    config: DecoderConfig, optimizer: optax.GradientTransformation
) -> Callable[[Params, Any, Questions], tuple[Params, Any, jax.Array]]:
    """Return a function that makes one step: (parameters, optimizer state, questions) -> (both updated, loss).

    The loss is the cross-entropy with a uniform distribution over the correct answers. Fresh questions have weight 0.
    """

    def loss(params: Params, ids_BxT: jax.Array, place_BxN: jax.Array, right_BxNxV: jax.Array, weight_B: jax.Array):
        # Any of several shortest ways is right: the model should not be punished for one of them.
        target_BxNxV = right_BxNxV / right_BxNxV.sum(-1, keepdims=True)
        log_p_BxNxV = jax.nn.log_softmax(answer_logits(config, params, ids_BxT, place_BxN))
        loss_B = -(target_BxNxV * log_p_BxNxV).sum(-1).mean(-1)
        return (loss_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1.0)

    # Donated, as the parameters and moments are not needed after the step.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, *arrays: jax.Array) -> tuple[Params, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, *arrays)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    def run(params: Params, state: Any, questions: Questions) -> tuple[Params, Any, jax.Array]:
        # Fresh questions stay in the batch with weight 0, so that its shape is the same at each step.
        weight_B = (~questions.fresh_B).astype(np.float32)
        right_BxNxV = questions.right_BxNxV.astype(np.float32)
        return step(params, state, questions.ids_BxT, questions.place_BxN, right_BxNxV, weight_B)

    return run


def correct(config: DecoderConfig, params: Params, questions: Questions) -> np.ndarray:
    """Return which questions are answered correctly at all of their positions, bool [B].

    Earlier answers in a text are the correct ones: where all argmaxes are correct, so is the generated text.
    """
    parts, count = [], len(questions.fresh_B)
    for start in range(0, count, _BATCH):
        rows_B = np.minimum(np.arange(start, start + _BATCH), count - 1)  # one shape: the last batch repeats a row
        logits_BxNxV = answer_logits(config, params, questions.ids_BxT[rows_B], questions.place_BxN[rows_B])
        best_BxN = np.asarray(logits_BxNxV).argmax(axis=-1)
        parts.append(np.take_along_axis(questions.right_BxNxV[rows_B], best_BxN[..., None], axis=2)[..., 0].all(axis=1))
    return np.concatenate(parts)[:count]


def tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Return the checkpoint's tensors by name: the inverse of ``weights.load_params``."""
    tensor_by_name = {}
    for name, weight in FAMILIES[config.family].weights.items():
        if name not in params:
            continue
        layers = enumerate(np.asarray(params[name])) if name.startswith(LAYERS) else [(0, np.asarray(params[name]))]
        for layer, array in layers:
            if weight.view is linear:
                # Heads and their width are one dimension in the files, and a Linear has its outputs first.
                array = array.reshape(len(array), -1).T
            elif weight.view is linear_of_heads:
                array = array.reshape(-1, array.shape[-1]).T
            tensor_by_name[weight.name.format(layer)] = array
    return tensor_by_name
