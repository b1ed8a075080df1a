"""Thresholds of BatchTopK at inference, calibrated on training rows after the last step, and before a score or a save.

A running mean of each batch's smallest kept activation would lag behind the parameters: after 78 steps a dictionary
trained with k = 32 would fire 20 features a token. So the threshold is set below the smallest of the
N k largest activations of the final parameters on N training tokens: L0 is k on these.
"""

import functools
import math

import jax
import jax.numpy as jnp

from saejax.dictionaries import Dictionary
from saejax.dictionaries.kinds.base import Arrays, Kind
from saejax.dictionaries.sparsity import lowest_level
from saejax.errors import Interrupted
from saejax.parallel.mesh import sharding
from saejax.training import cross_layer
from saejax.training.inputs import Batches
from saejax.training.over_members import measure_members
from saejax.training.stack import Hyperparams, TrainStack
from saejax.training.state import TrainState

_TOKENS = 16_384  # tokens that L0 is measured on: its relative error is below 1 %
_VALUES = 2**26  # maximum number of pre-activations: 256 MB in float32


class Calibration:
    """Finds the level [M] above which each member keeps activations; None for kinds that make nothing of it.

    Args:
      stack: what is trained.
    """

    def __init__(self, stack: TrainStack):
        self._stack = stack
        self._needed = type(stack.kind).finish is not Kind.finish  # else the kind does not use it
        self._run = jax.jit(functools.partial(_calibrate, stack), out_shardings=sharding(stack.mesh))

    def __call__(self, state: TrainState, batches: Batches, step: int) -> jax.Array | None:
        """Calibrate on training rows.

        Args:
          state: the state after ``step`` steps.
          batches: the training batches, of which the last ones before ``step`` are taken again.
          step: number of steps done.

        Raises:
          Interrupted: asked to stop while a batch was made.
        """
        if not self._needed:
            return None
        config, features = self._stack.config, self._stack.dictionary.n_features
        fitting = _VALUES // (config.batch * features)
        count = max(1, min(math.ceil(_TOKENS / config.batch), fitting, step))
        # The last batches, as their rows are still in memory.
        pooled = [batches.batch(earlier) for earlier in range(step - count, step)]
        if any(batch is None for batch in pooled):
            raise Interrupted("stopped after the last step; saved: run the same command to go on")
        return self._run(state.params, self._stack.hyperparams, [batch[0] for batch in pooled if batch is not None])


def _calibrate(stack: TrainStack, params: Arrays, hyper: Hyperparams, inputs: list[jax.Array]) -> jax.Array:
    """Return the level [M] above which each member keeps activations of all tokens of these batches together."""
    settings = stack.config.of_kind(stack.kind.name)
    x_SxNxD = jnp.concatenate(inputs, axis=1)
    if stack.is_cross_layer:
        (x_LxNxD,) = cross_layer.scale_values(stack, hyper, [x_SxNxD])
        return cross_layer.find_levels(stack, params, hyper, x_LxNxD)  # type: ignore[arg-type]

    def of_member(arrays: Arrays, hyper: Hyperparams, x_NxD: jax.Array, _: jax.Array) -> jax.Array:
        member = Dictionary(stack.dictionary, "float32", **arrays)  # as finished dictionaries are read
        inputs = member.encoder_inputs(x_NxD)
        f_NxF = stack.kind.encode_in_training(member, inputs, hyper.kind_params, settings)
        return lowest_level(f_NxF, inputs.pre_xF)

    return measure_members(stack, of_member, params, hyper, (x_SxNxD,))
