"""Train state: initialisation, shardings, one optimiser update, and export of the finished dictionaries.

Every array of a ``TrainState`` has a leading axis over the members of a stack. The layers of a cross-layer transcoder
differ in shape: there, parameters and optimiser states are tuples over layers, without that axis.
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
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, rescale
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.modules import parameter_table
from saejax.parallel.mesh import fitting_sharding
from saejax.training.optimizer import apply_constraints, learning_rate_schedule, make_optimizer
from saejax.training.settings import MOST_TOKENS
from saejax.training.stack import TrainStack

STATE_VERSION = 4  # version of the tree below; a checkpoint of another version is refused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that a training step updates."""

    params: Any  #: arrays of the dictionaries, by name
    optimizer: Any  #: state of the Optax chain
    silent_MxF: jax.Array  #: tokens since each feature last fired, int32
    step_M: jax.Array  #: number of steps done, int32; the same for all members

    def layer(self, layer: int) -> "TrainState":
        """Return the state of one layer of a cross-layer transcoder, in the form of one member's."""
        rest = {name: getattr(self, name)[layer] for name in PER_MEMBER}
        return TrainState(self.params[layer], self.optimizer[layer], **rest)


PER_MEMBER = ("silent_MxF", "step_M")


def init_state(stack: TrainStack) -> TrainState:
    """Return the state before the first step, on the devices."""
    return jax.jit(functools.partial(_initial_state, stack), out_shardings=state_shardings(stack))()


def _initial_state(stack: TrainStack) -> TrainState:
    """Return the initial state; to be traced.

    Directions are random, from each member's seed and, in a stack of several sites, the name of its site: were they
    the same at all sites, what little training leaves of them would pass for features that layers share. The decoder's
    bias starts at the target's mean, everything else at 0.
    """
    config, dictionary, members = stack.config, stack.dictionary, stack.members
    vectors = stack.kind.start(config.of_kind(dictionary.kind))

    def init_member(key: jax.Array, bias_D: jax.Array) -> Arrays:
        arrays = Dictionary.initial(dictionary, key, config.matmul, config.state_dtype).arrays | dict(b_dec_D=bias_D)
        return arrays | {name: jnp.full_like(arrays[name], value) for name, value in vectors.items()}

    # Biases start in the scaled units in which members train.
    bias_MxD = np.stack([scale.bias_D * scale.output for scale in stack.scales]).astype(config.state_dtype)
    keys = [(jax.random.key(member.settings["seed"]), member.site_seed) for member in members]
    key_M = jnp.stack([jax.random.fold_in(key, site) if site else key for key, site in keys])
    # One by one, so that a member starts with the same bits whatever the others are.
    params: Any = lax.map(lambda args: init_member(*args), (key_M, jnp.asarray(bias_MxD)))
    optimizer = make_optimizer(config, dictionary.widths)
    if stack.is_cross_layer:  # the stack's transcoders, which write nothing to later layers yet
        params = tuple(_pad_decoder({name: array[i] for name, array in params.items()}, len(members) - 1 - i)
                       for i in range(len(members)))  # fmt: skip
        optimizer_state: Any = tuple(map(optimizer.init, params))
    else:
        optimizer_state = jax.vmap(optimizer.init)(params)
    return TrainState(
        params,
        optimizer_state,
        jnp.zeros((len(members), dictionary.n_features), jnp.int32),
        jnp.zeros(len(members), jnp.int32),
    )


def _pad_decoder(arrays: Arrays, later_layers: int) -> Arrays:
    columns = later_layers * arrays["W_dec_FxD"].shape[1]
    return arrays | dict(W_dec_FxD=jnp.pad(arrays["W_dec_FxD"], ((0, 0), (0, columns))))


def abstract_state(stack: TrainStack) -> TrainState:
    """Return shapes and shardings of the state: members over ``member``, features over ``model``.

    With ``zero_optimizer`` the optimiser's matrices are split over ``data`` too, along their other axis.
    """
    specs = {name: spec for name, (_, spec) in parameter_table(stack.dictionary).items()}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Moments of the optimiser carry the name of their parameter in their path, and are placed like it.
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        spec = next((specs[name] for name in names if name in specs), (None,) * max(leaf.ndim - 1, 0))
        spec = ("model",) if names[0] == "silent_MxF" else spec
        if stack.config.zero_optimizer and names[0] == "optimizer":
            spec = _over_data(spec)
        where = fitting_sharding(stack.mesh, leaf.shape, *["member"] * (leaf.ndim - len(spec)), *spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    shapes = jax.eval_shape(functools.partial(_initial_state, stack))
    return jax.tree_util.tree_map_with_path(place, shapes)


def state_shardings(stack: TrainStack) -> TrainState:
    """Return the sharding of every array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(stack))


def place_update(arrays: Arrays, dictionary: DictionaryConfig, mesh: Mesh, *, over_data: bool) -> Arrays:
    """Constrain one member's gradients or parameters to the placement of a ZeRO optimiser, or of parameters.

    Constrained before and after an update, devices sum the part of the gradients that each needs, and send nothing but
    new parameters (Rajbhandari et al., 2020).

    Args:
      arrays: arrays by name, without an axis over members; to be traced.
      dictionary: what the members have in common.
      mesh: the devices.
      over_data: True: as the optimiser is placed; False: as parameters are.
    """
    inside = jax.sharding.get_abstract_mesh()  # of a part of the mesh that another axis has split already
    mesh, table = (mesh if inside.empty else inside), parameter_table(dictionary)

    def place(name: str, array: jax.Array) -> jax.Array:
        spec = table[name][1]
        spec = _over_data(spec) if over_data else spec
        return lax.with_sharding_constraint(array, fitting_sharding(mesh, array.shape, *spec))

    return {name: place(name, array) for name, array in arrays.items()}


def _over_data(spec: Sequence[str | None]) -> tuple[str | None, ...]:
    """Split matrices of features along their other axis too."""
    return tuple(axis or "data" for axis in spec) if "model" in spec else tuple(spec)


def apply_update(
    stack: TrainStack,
    state: TrainState,
    grads: Arrays,
    fired_F: jax.Array,
    peak_rate: jax.Array,
    tokens: int,
) -> tuple[TrainState, Arrays]:
    """Apply one member's gradient.

    Args:
      stack: what is trained.
      state: the member's state, without an axis over members.
      grads: gradient of its loss.
      fired_F: whether each feature fired on any of the tokens.
      peak_rate: the member's peak learning rate.
      tokens: tokens of the batch.

    Returns:
      The next state, and metrics of the update: learning_rate, gradient_norm, dead (share of features).
    """
    config, params, dictionary = stack.config, state.params, stack.dictionary
    dead_F = state.silent_MxF >= config.dead_tokens
    rate = peak_rate * learning_rate_schedule(config, stack.steps)(state.step_M).astype(peak_rate.dtype)
    place = functools.partial(place_update, dictionary=dictionary, mesh=stack.mesh)
    if config.zero_optimizer:
        grads, params = (place(place(arrays, over_data=False), over_data=True) for arrays in (grads, params))
    optimizer = make_optimizer(config, dictionary.widths)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, params, learning_rate=rate)
    moved = optax.apply_updates(params, updates)
    after = apply_constraints(config, stack.kind, moved, before=params, widths=dictionary.widths)
    if config.zero_optimizer:
        after = place(place(after, over_data=True), over_data=False)
    longest = MOST_TOKENS - tokens  # the count stops there, as int32 would overflow
    silent_F = jnp.where(fired_F, 0, jnp.minimum(state.silent_MxF, longest) + tokens)
    norm = optax.tree.get(optimizer_state, "gradient_norm")
    metrics = dict(learning_rate=rate, gradient_norm=norm, dead=jnp.mean(dead_F.astype(jnp.float32)))
    return TrainState(after, optimizer_state, silent_F, state.step_M + 1), metrics


def finish_dictionary(stack: TrainStack, state: TrainState, index: int, kept_M: Any = None) -> Dictionary:
    """Return a member's trained dictionary for raw activations; decoder rows that grew freely get length 1.

    Args:
      stack: what was trained.
      state: the state.
      index: index of the member.
      kept_M: result of ``thresholds.Calibration``; None: 0.
    """
    arrays = {name: array[index] for name, array in state.params.items()}
    dictionary, kind, member, scale = stack.dictionary, stack.kind, stack.members[index], stack.scales[index]
    # Rows first get length 1 in scaled units, because the scales of input and output may differ.
    arrays = rescale.unit_rows(kind, kind.finish(arrays, 0.0 if kept_M is None else kept_M[index]), dictionary.widths)
    is_sae = member.target == member.site
    facts = stack.facts(member)
    config = dataclasses.replace(
        dictionary,
        site=member.site,
        target="" if is_sae else member.target,
        # Like all that is compared with activations: these come out 1 / output as large.
        **facts | dict(fires_above=facts.get("fires_above", 0.0) / scale.output),
        max_norm=scale.max_norm,
        target_max_norm=None if is_sae else scale.target_max_norm,
        scales=scale.scales,
        max_norms=scale.max_norms,
    )
    arrays = rescale.fold_input_scaling(kind, arrays, scale.input, scale.output)
    return Dictionary(config, stack.config.matmul, **arrays)
