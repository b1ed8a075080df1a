"""One training step of a stack as a pure, jit-compiled, sharded function of (state, batch).

The step of one member is written once (``_member_step``); a stack is that function over a leading axis. On a CPU the
members of a device run one after the other (batched matrix products are slower there than their parts), on
accelerators they are vectorised; over the mesh's ``member`` axis they are split.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.parallel import fitting_sharding, sharding
from saejax.settings import TrainConfig
from saejax.training import resampling, schedules
from saejax.training.members import Hyper, Member, SiteScale
from saejax.training.objective import Arrays, Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; every array has a leading axis over the members, M.

    Attributes:
      params: the dictionaries' arrays.
      optimizer: optax state.
      silent_MxF: tokens since each feature last fired, int32.
      kept_M: running mean of the smallest activation that a batch kept (batchtopk, matryoshka; else 0).
      step_M: steps done, int32; the same for all.
    """

    params: Arrays
    optimizer: Any
    silent_MxF: jax.Array
    kept_M: jax.Array
    step_M: jax.Array


class Trainer:
    """Makes the initial state and the step of a stack on one mesh.

    Args:
      config: how to train.
      dictionary: what the members have in common.
      members: who they are.
      mesh: the devices; its ``member`` axis must divide the members.
      steps: length of the whole run, for the schedules.
      scales: of each member.
    """

    def __init__(
        self,
        config: TrainConfig,
        dictionary: DictionaryConfig,
        members: Sequence[Member],
        mesh: Mesh,
        steps: int,
        scales: Sequence[SiteScale],
    ):
        self.config, self.dictionary, self.members, self.mesh = config, dictionary, list(members), mesh
        self.scales = list(scales)
        self._steps = steps
        self._objective = Objective(config, dictionary, steps)
        self._optimizer = _optimizer(config)
        self.sites = list(dict.fromkeys((member.site, member.target) for member in members))  # of the batch, in order
        hyper = Hyper.of(members, scales, self.sites, config.state_dtype)
        self.abstract_hyper = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._by_member(array.shape)), hyper
        )
        self._host_hyper = hyper
        by_member = "member" if len(self.sites) == len(members) else None
        self.batch_sharding = fitting_sharding(mesh, (len(self.sites), config.batch, 1), by_member, "data", None)
        self.abstract_state = self._abstract()
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.compiled = jax.jit(self.pure_step, donate_argnums=0, out_shardings=(self.shardings, sharding(mesh)))

    def step(self, state: TrainState, batch: tuple[jax.Array, ...]) -> tuple[TrainState, Arrays]:
        """One step of all members.

        Args:
          state: donated.
          batch: inputs [S, B, D] of the sites in ``self.sites``, raw; and for transcoders their targets.

        Returns:
          The next state, and metrics [M].
        """
        return self.compiled(state, self.hyper, batch)

    @functools.cached_property
    def hyper(self) -> Hyper:
        """What the step reads of the members, on the devices."""
        return jax.tree.map(
            lambda array, abstract: jax.device_put(array, abstract.sharding), self._host_hyper, self.abstract_hyper
        )

    def _by_member(self, shape: Sequence[int]) -> NamedSharding:
        return fitting_sharding(self.mesh, shape, "member", *[None] * (len(shape) - 1))

    def initial_state(self) -> TrainState:
        """The state before the first step, sharded over the mesh."""
        return jax.jit(self._initial, out_shardings=self.shardings)()

    def finish(self, state: TrainState, index: int) -> Dictionary:
        """A member's trained dictionary, for raw activations.

        Every kind is homogeneous, so the scales leave by dividing biases and thresholds by them; where decoder
        rows have grown freely their lengths move to the encoder.
        """
        member, scale = self.members[index], self.scales[index]
        arrays = {name: array[index] for name, array in state.params.items()}
        if self.dictionary.has_threshold and self.dictionary.kind != "jumprelu":
            arrays["threshold_F"] = jnp.full_like(arrays["threshold_F"], state.kept_M[index])
        arrays = unit_decoder(arrays)
        ratio = scale.input / scale.output
        for name in arrays:
            if name in ("W_enc_DxF", "W_skip_DxD"):
                arrays[name] = arrays[name] * ratio
            elif name not in ("W_dec_FxD", "r_mag_F"):
                arrays[name] = arrays[name] / scale.output
        described = dataclasses.replace(
            self.dictionary,
            site=member.site,
            target="" if member.target == member.site else member.target,
            k=member.k if self.dictionary.k else 0,
            fires_above=self.dictionary.fires_above / scale.output,
            max_norm=scale.max_norm,
        )
        return Dictionary(described, self.config.matmul, **arrays)

    def _initial(self) -> TrainState:
        config = self.config

        def one(seed: jax.Array, bias_D: jax.Array) -> Arrays:
            member = Dictionary.initial(self.dictionary, jax.random.key(seed), config.matmul, config.state_dtype)
            arrays = member.arrays | dict(b_dec_D=bias_D)
            if self.dictionary.kind == "jumprelu":
                arrays["threshold_F"] = jnp.full_like(arrays["threshold_F"], config.initial_threshold)
            return arrays

        bias_MxD = np.stack([scale.bias_D * scale.output for scale in self.scales]).astype(config.state_dtype)
        seed_M = jnp.array([member.seed for member in self.members], jnp.int32)
        # One by one, so that a member starts with the same bits alone and in a stack.
        params = lax.map(lambda args: one(*args), (seed_M, jnp.asarray(bias_MxD)))
        members, features = len(self.members), self.dictionary.n_features
        return TrainState(
            params,
            jax.vmap(self._optimizer.init)(params),
            jnp.zeros((members, features), jnp.int32),
            jnp.zeros(members, config.state_dtype),
            jnp.zeros(members, jnp.int32),
        )

    def _abstract(self) -> TrainState:
        specs = {name: spec for name, (_, spec) in parameter_table(self.dictionary).items()}

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            spec = next((specs[name] for name in names if name in specs), (None,) * (leaf.ndim - 1))
            spec = ("model",) if names[0] == "silent_MxF" else spec
            where = fitting_sharding(self.mesh, leaf.shape, "member", *spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self._initial))

    def pure_step(self, state: TrainState, hyper: Hyper, raw: tuple[jax.Array, ...]) -> tuple[TrainState, Arrays]:
        """``step`` before it is compiled, for programs of many steps."""
        after, metrics = self._each_member(self._member_step, state, hyper, raw)
        if self.config.resample_every:
            now = resampling.due(self.config, self._steps, after.step_M[0])
            resample = functools.partial(self._each_member, self._resample, hyper=hyper, raw=raw)
            after = lax.cond(now, resample, lambda state: state, after)
        return after, metrics

    def _each_member(self, apply: Any, state: TrainState, hyper: Hyper, raw: tuple[jax.Array, ...]) -> Any:
        """``apply(state, hyper, inputs, targets)``, both scaled, for each member."""
        raw = tuple(values_SxBxD.astype(self.config.state_dtype) for values_SxBxD in raw)

        def one(own: Any, *shared: jax.Array) -> Any:
            state, hyper, values = own
            if values is None:
                values = [lax.dynamic_index_in_dim(values_SxBxD, hyper.site, keepdims=False) for values_SxBxD in shared]
            x_BxD = values[0] * hyper.input_scale
            y_BxD = values[1] * hyper.output_scale if len(values) > 1 else x_BxD
            return apply(state, hyper, x_BxD, y_BxD)

        if len(self.sites) == len(self.members):  # each member has its own values, on its own devices
            return over_members(one, (state, hyper, raw), (), self.mesh)
        return over_members(one, (state, hyper, None), raw, self.mesh)

    def _resample(self, state: TrainState, hyper: Hyper, x_BxD: jax.Array, y_BxD: jax.Array) -> TrainState:
        y_hat_BxD = self._objective.reconstruction(state.params, x_BxD, hyper)
        return resampling.resampled(self.config, self.dictionary, state, hyper, x_BxD, y_BxD, y_hat_BxD)

    def _member_step(
        self, state: TrainState, hyper: Hyper, x_BxD: jax.Array, y_BxD: jax.Array
    ) -> tuple[TrainState, Arrays]:
        """The step of one member; the state's arrays have no member axis here."""
        config = self.config
        dead_F = state.silent_MxF >= config.dead_tokens
        gradient = jax.grad(self._objective, has_aux=True)
        grads, (metrics, fired_F, smallest) = gradient(state.params, x_BxD, y_BxD, hyper, state.step_M, dead_F)
        grads = self._projected(grads, state.params)
        updates, optimizer = self._optimizer.update(grads, state.optimizer, state.params)
        rate = hyper.learning_rate * schedules.learning_rate(config, self._steps, state.step_M).astype(x_BxD.dtype)
        params = {name: value - rate * updates[name] for name, value in state.params.items()}
        params = self._constrained(params, state.params)
        silent_F = jnp.where(fired_F, 0, state.silent_MxF + x_BxD.shape[0])
        mean = state.kept_M + config.threshold_rate * (smallest - state.kept_M)
        kept = jnp.where(state.step_M == 0, smallest, mean)
        metrics |= dict(learning_rate=rate, dead=jnp.mean(dead_F.astype(jnp.float32)))
        return TrainState(params, optimizer, silent_F, kept, state.step_M + 1), metrics

    def _projected(self, grads: Arrays, params: Arrays) -> Arrays:
        """Gradients of what may move: none of what is frozen, and of unit rows only the part that turns them."""
        frozen = {"none": (), "decoder": ("W_dec_FxD",), "encoder": ("W_enc_DxF",)}[self.config.freeze]
        grads = grads | {name: jnp.zeros_like(grads[name]) for name in frozen}
        if self.config.decoder_norm == "unit":
            grads["W_dec_FxD"] = _tangent(grads["W_dec_FxD"], params["W_dec_FxD"])
        return grads

    def _constrained(self, params: Arrays, before: Arrays) -> Arrays:
        """What holds after every step: unit rows if asked for, thresholds of at least 0, frozen arrays as they were."""
        if self.config.decoder_norm == "unit":
            W_dec_FxD = params["W_dec_FxD"]
            params["W_dec_FxD"] = W_dec_FxD / jnp.linalg.norm(W_dec_FxD, axis=-1, keepdims=True)
        if self.dictionary.kind == "jumprelu":
            params["threshold_F"] = jnp.maximum(params["threshold_F"], 0.0)
        if self.config.freeze != "none":
            name = {"decoder": "W_dec_FxD", "encoder": "W_enc_DxF"}[self.config.freeze]
            params[name] = before[name]
        return params


def over_members(one: Any, own: Any, shared: Sequence[jax.Array], mesh: Mesh) -> Any:
    """Applies ``one(own of a member, *shared)`` to every member.

    Args:
      one: a function of trees whose arrays have no member axis.
      own: a tree of arrays with a leading axis over members, split over the mesh's ``member`` axis.
      shared: what all members read, the same for each.
      mesh: the devices.
    """
    members = jax.tree.leaves(own)[0].shape[0]
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def local(own: Any, *shared: jax.Array) -> Any:
        count = jax.tree.leaves(own)[0].shape[0]
        if count == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], own), *shared))
        if on_cpu:
            return lax.map(lambda member: one(member, *shared), own)
        return jax.vmap(one, in_axes=(0, *[None] * len(shared)))(own, *shared)

    if mesh.shape["member"] == 1 or members == 1:
        return local(own, *shared)
    by_member, everywhere = PartitionSpec("member"), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_member, *[everywhere] * len(shared)),
        out_specs=by_member,
        axis_names={"member"},
        check_vma=False,
    )(own, *shared)


def unit_decoder(arrays: Arrays) -> Arrays:
    """The same dictionary with decoder rows of length 1: feature activations take over the length."""
    length_F = jnp.linalg.norm(arrays["W_dec_FxD"], axis=-1)
    length_F = jnp.where(length_F > 0, length_F, jnp.ones_like(length_F))
    arrays = dict(
        arrays, W_dec_FxD=arrays["W_dec_FxD"] / length_F[:, None], W_enc_DxF=arrays["W_enc_DxF"] * length_F[None]
    )
    for name in ("b_enc_F", "b_mag_F", "threshold_F"):
        if name in arrays:
            arrays[name] = arrays[name] * length_F
    return arrays


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam's direction after clipping, with decoupled weight decay (Loshchilov and Hutter, 2019) of the encoder.

    The decoder's rows have unit norm and its bias starts at the data's mean: to decay those would undo that. The
    learning rate is not in here, because members have their own.
    """
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(optax.scale_by_adam())
    if config.weight_decay:
        only_encoder = functools.partial(_named, "W_enc_DxF")
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=only_encoder))
    return optax.chain(*parts)


def _named(name: str, params: Arrays) -> dict[str, bool]:
    return {key: key == name for key in params}


def _tangent(grad_FxD: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """The part of the gradient that turns the unit rows; the part along them would be undone anyway."""
    return grad_FxD - jnp.sum(grad_FxD * W_dec_FxD, axis=-1, keepdims=True) * W_dec_FxD
