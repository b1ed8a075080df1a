"""The transformer of an algorithm: Llama's architecture, trained on the project's own decoder, saved for any tool."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saejax.errors import UserError
from saejax.ground_truth.algorithms.questions import Questions
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Hook, run_layers
from saejax.models.families import FAMILIES, read_config
from saejax.models.families.table import linear, linear_of_heads
from saejax.models.parameters import LAYERS, parameter_table

HEADS, PLAIN = 4, "answers"
Params = dict[str, jax.Array]
Answers = Mapping[str, tuple[jax.Array, jax.Array]]  # of each test the logits, and which words are right [B, N, V]
Tests = Callable[[DecoderConfig, Params, jax.Array, jax.Array, jax.Array], Answers]


class Schedule(NamedTuple):
    """How it is trained: AdamW, its rate rising over a twentieth of the steps and then falling to 0 as a cosine."""

    steps: int
    learning_rate: float

    def optimizer(self) -> optax.GradientTransformation:
        """Of the parameters."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(self.steps // 20, 1), self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


def describe(words: int, context: int, layers: int, width: int) -> dict[str, Any]:
    """The fields of ``config.json``, for so many words, positions of a context and layers of a width.

    Raises:
      UserError: the width is none that four heads with rotary embeddings can share.
    """
    if width % (2 * HEADS):
        raise UserError(f"--algorithm.width={width}: expected a multiple of {2 * HEADS}, for {HEADS} heads")
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


def read(fields: Mapping[str, Any]) -> DecoderConfig:
    """What the decoder has to know of it."""
    return read_config(dict(fields), "config.json")


def initial(config: DecoderConfig, seed: int) -> Params:
    """Random weights: norms 1, the others normal with a variance of one over the number of their inputs."""
    params = {}
    for number, (name, (shape, _)) in enumerate(parameter_table(config).items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        own = shape[1:] if name.startswith(LAYERS) else shape
        inputs = own[0] * own[1] if name.endswith("o_HxKxD") else config.d_model if "embed" in name else own[0]
        normal = jax.random.normal(key, shape) * inputs**-0.5
        params[name] = jnp.ones(shape) if "norm" in name else normal
    return params


def answers(
    config: DecoderConfig, params: Params, ids_BxT: jax.Array, place_BxN: jax.Array, hook: Hook | None = None
) -> jax.Array:
    """Logits at each place of texts given by their ids, [B, N, V], with all sites changed by a hook; to be traced."""
    start_BxTxD, hooked = decoder.embed(config, params, ids_BxT), None if hook else ()
    x_BxTxD = run_layers(config, params, start_BxTxD, 0, config.n_layers, hook, hooked).x
    x_BxNxD = jnp.take_along_axis(x_BxTxD, place_BxN[..., None], axis=1)
    return decoder.unembed(config, params, x_BxNxD)


def plain(
    config: DecoderConfig, params: Params, ids_BxT: jax.Array, place_BxN: jax.Array, right_BxNxV: jax.Array
) -> Answers:
    """The one test of a transformer that is free how to answer: its answers; ids, place, right: of ``Questions``."""
    return {PLAIN: (answers(config, params, ids_BxT, place_BxN), right_BxNxV)}


def trainer(
    config: DecoderConfig, schedule: Schedule, tests: Tests = plain
) -> Callable[[Params, Any, Questions], tuple[Params, Any, jax.Array]]:
    """A function that makes a step: parameters, the optimizer's state and questions in, both and the loss out.

    The loss is the cross-entropy of an even choice among right answers, summed over the tests; fresh questions have no
    part in it.
    """
    optimizer = schedule.optimizer()

    def loss(params: Params, ids_BxT: jax.Array, place_BxN: jax.Array, right_BxNxV: jax.Array, weight_B: jax.Array):
        loss_B = jnp.zeros_like(weight_B)
        for logits_BxNxV, wanted_BxNxV in tests(config, params, ids_BxT, place_BxN, right_BxNxV).values():
            target_BxNxV = wanted_BxNxV / wanted_BxNxV.sum(-1, keepdims=True)
            loss_B -= (target_BxNxV * jax.nn.log_softmax(logits_BxNxV)).sum(-1).mean(-1)
        return (loss_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, *arrays: jax.Array) -> tuple[Params, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, *arrays)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    def run(params: Params, state: Any, some: Questions) -> tuple[Params, Any, jax.Array]:
        weight_B = (~some.fresh_B).astype(np.float32)
        return step(params, state, some.ids_BxT, some.place_BxN, some.right_BxNxV.astype(np.float32), weight_B)

    return run


def right(
    config: DecoderConfig,
    params: Params,
    questions: Questions,
    batch: int = 500,
    *,
    tests: Tests = plain,
    test: str = PLAIN,
) -> np.ndarray:
    """Which questions, run a batch at a time, pass a test at all of their places, bool [B].

    Answers that stand before others are the right ones; where all are right, so would those be that it gives by itself.
    """

    @jax.jit
    def passed(params: Params, *arrays: jax.Array) -> jax.Array:
        logits_BxNxV, right_BxNxV = tests(config, params, *arrays)[test]
        best_BxN = logits_BxNxV.argmax(-1)
        return (jnp.take_along_axis(right_BxNxV, best_BxN[..., None], axis=2)[..., 0] > 0).all(1)

    found = []
    for start in range(0, len(questions.fresh_B), batch):
        rows_B = np.minimum(np.arange(start, start + batch), len(questions.fresh_B) - 1)
        arrays = (questions.ids_BxT[rows_B], questions.place_BxN[rows_B], questions.right_BxNxV[rows_B])
        found.append(np.asarray(passed(params, *arrays)))
    return np.concatenate(found)[: len(questions.fresh_B)]


def tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """The checkpoint's tensors: parameters the other way round from how ``weights.load_params`` reads them."""
    made = {}
    for name, weight in FAMILIES[config.family].weights.items():
        if name not in params:
            continue
        layers = enumerate(np.asarray(params[name])) if name.startswith(LAYERS) else [(0, np.asarray(params[name]))]
        for layer, array in layers:
            if weight.view is linear:
                array = array.reshape(len(array), -1).T
            elif weight.view is linear_of_heads:
                array = array.reshape(-1, array.shape[-1]).T
            made[weight.name.format(layer)] = array
    return made
