"""One training step as a pure, jit-compiled, sharded function of (state, batch)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from saejax.dictionaries import Dictionary, DictionaryConfig, losses
from saejax.parallel import fitting_sharding, sharding
from saejax.settings import TrainConfig
from saejax.training import schedules

# Features over `model`; everything else is replicated.
_SPECS = {"W_enc_DxF": (None, "model"), "b_enc_F": ("model",), "W_dec_FxD": ("model", None), "b_dec_D": (None,)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      params: the dictionary's arrays.
      optimizer: optax state.
      silent_F: tokens since each feature last fired, int32.
      step: steps done, int32 scalar.
    """

    params: nnx.State
    optimizer: Any
    silent_F: jax.Array
    step: jax.Array


class Trainer:
    """Makes the initial state and the step for one dictionary on one mesh.

    Args:
      config: how to train.
      dictionary: what to train.
      mesh: the devices.
      steps: length of the whole run, for the schedules.
      scale: factor that brings activations to a mean norm of sqrt(d); folded out again by ``finish``.
      mean_D: mean of the raw training activations; the decoder bias starts there.
    """

    def __init__(self, config: TrainConfig, dictionary: DictionaryConfig, mesh: Mesh, steps: int, scale: float, mean_D):
        self.config, self.mesh, self.scale = config, mesh, scale
        self._dictionary, self._mean_D = dictionary, mean_D
        self._learning_rate = schedules.learning_rate(config, steps)
        self._l1 = schedules.l1_coefficient(config, steps)
        self._optimizer = _optimizer(config, self._learning_rate)
        self.batch_sharding = sharding(mesh, "data", None)
        abstract = jax.eval_shape(self._initial)
        self.shardings = self._state_shardings(abstract)
        self.abstract_state = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, self.shardings
        )
        self.step = jax.jit(
            self._step,
            donate_argnums=0,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, sharding(mesh)),
        )

    def initial_state(self) -> TrainState:
        """The state before the first step, sharded over the mesh."""
        return jax.jit(self._initial, out_shardings=self.shardings)()

    def finish(self, state: TrainState) -> Dictionary:
        """The trained dictionary for raw activations.

        ReLU and top-k are homogeneous, so the input scale leaves by dividing the biases by it.
        """
        arrays = {name: state.params[name][...] for name in _SPECS}
        for bias in ("b_enc_F", "b_dec_D"):
            arrays[bias] = arrays[bias] / self.scale
        return Dictionary(self._dictionary, **arrays, operands=self.config.matmul)

    def _initial(self) -> TrainState:
        config = self.config
        key = jax.random.key(config.seed)
        dictionary = Dictionary.initial(self._dictionary, key, config.matmul, config.state_dtype)
        dictionary.b_dec_D[...] = jnp.asarray(self._mean_D, config.state_dtype) * self.scale
        self._graph, params = nnx.split(dictionary)
        silent_F = jnp.zeros(self._dictionary.n_features, jnp.int32)
        return TrainState(params, self._optimizer.init(params), silent_F, jnp.zeros((), jnp.int32))

    def _state_shardings(self, abstract: TrainState) -> TrainState:
        def place(path, leaf) -> NamedSharding:
            names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            spec = next((_SPECS[name] for name in names if name in _SPECS), None)
            if names[0] == "silent_F":
                spec = ("model",)
            return fitting_sharding(self.mesh, leaf.shape, *(spec or (None,) * leaf.ndim))

        return jax.tree_util.tree_map_with_path(place, abstract)

    def _loss(self, params: nnx.State, x_BxD: jax.Array, step: jax.Array):
        dictionary = nnx.merge(self._graph, params)
        f_BxF = dictionary.encode(x_BxD)
        x_hat_BxD = dictionary.decode(f_BxF)
        error = losses.squared_error(x_BxD, x_hat_BxD)
        penalty = jnp.zeros_like(error)
        if self.config.l1 and dictionary.config.kind == "standard":
            penalty = self._l1(step) * losses.l1_norm_weighted(f_BxF, dictionary.W_dec_FxD[...])
        fired_BxF = f_BxF > 0
        metrics = dict(
            loss=error + penalty,
            mse=error,
            sparsity=penalty,
            l0=jnp.mean(jnp.sum(fired_BxF, axis=-1)),
            explained_variance=losses.explained_variance(x_BxD, x_hat_BxD),
            learning_rate=self._learning_rate(step),
        )
        return error + penalty, (metrics, jnp.any(fired_BxF, axis=0))

    def _step(self, state: TrainState, raw_BxD: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        x_BxD = raw_BxD.astype(self.config.state_dtype) * self.scale
        gradient = jax.grad(self._loss, has_aux=True)
        grads, (metrics, fired_F) = gradient(state.params, x_BxD, state.step)
        grads["W_dec_FxD"][...] = _tangent(grads["W_dec_FxD"][...], state.params["W_dec_FxD"][...])
        updates, optimizer = self._optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params["W_dec_FxD"][...] = _unit_rows(params["W_dec_FxD"][...])
        silent_F = jnp.where(fired_F, 0, state.silent_F + x_BxD.shape[0])
        return TrainState(params, optimizer, silent_F, state.step + 1), metrics


def _optimizer(config: TrainConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam after clipping to global norm 1, with decoupled weight decay (Loshchilov and Hutter, 2019) of the encoder.

    The decoder's rows have unit norm and its bias starts at the data's mean: to decay those would undo that.
    """
    clip = optax.clip_by_global_norm(1.0)
    if not config.weight_decay:
        return optax.chain(clip, optax.adam(learning_rate))

    def encoder_only(params: nnx.State) -> nnx.State:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(getattr(key, "key", None) == "W_enc_DxF" for key in path), params
        )

    return optax.chain(clip, optax.adamw(learning_rate, weight_decay=config.weight_decay, mask=encoder_only))


def _tangent(grad_FxD: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """The part of the gradient that turns the unit rows; the part along them would be undone anyway."""
    return grad_FxD - jnp.sum(grad_FxD * W_dec_FxD, axis=-1, keepdims=True) * W_dec_FxD


def _unit_rows(W_dec_FxD: jax.Array) -> jax.Array:
    return W_dec_FxD / jnp.linalg.norm(W_dec_FxD, axis=-1, keepdims=True)
