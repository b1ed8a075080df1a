"""What a training step changes: its arrays before the first step, where they are on the mesh, what becomes of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, kinds, rescale
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.modules import parameter_table
from saejax.parallel.mesh import fitting_sharding
from saejax.settings import TrainConfig
from saejax.training.members import Member, SiteScale
from saejax.training.updates import make_optimizer

STATE_VERSION = 2  # of the tree below; a checkpoint of another is refused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; every array has a leading axis over the members, M.

    Attributes:
      params: the dictionaries' arrays; of a cross-layer transcoder those of each layer, a tuple without that axis.
      optimizer: optax state, or one of each layer.
      silent_MxF: tokens since each feature last fired, int32.
      kept_M: running mean of the smallest activation that a batch kept (batchtopk, matryoshka; else 0).
      step_M: steps done, int32; the same for all.
    """

    params: Any
    optimizer: Any
    silent_MxF: jax.Array
    kept_M: jax.Array
    step_M: jax.Array


def initial_state(
    config: TrainConfig, dictionary: DictionaryConfig, members: Sequence[Member], scales: Sequence[SiteScale]
) -> TrainState:
    """The state before the first step; to be traced.

    Random directions from each member's seed and, in a stack of several sites, its site's place among them; the
    decoder's bias where its site's scale says, everything else 0. Were the directions the same at all sites, what
    little training leaves of them would pass for features that the layers share.
    """

    start = kinds.by_name(dictionary.kind).start(config.of_kind(dictionary.kind))

    def one(key: jax.Array, bias_D: jax.Array) -> Arrays:
        member = Dictionary.initial(dictionary, key, config.matmul, config.state_dtype)
        arrays = member.arrays | dict(b_dec_D=bias_D)
        return arrays | {name: jnp.full_like(arrays[name], value) for name, value in start.items()}

    bias_MxD = np.stack([scale.bias_D * scale.output for scale in scales]).astype(config.state_dtype)
    sites = list(dict.fromkeys(member.site for member in members))
    keys = [(jax.random.key(member.settings["seed"]), sites.index(member.site)) for member in members]
    key_M = jnp.stack([jax.random.fold_in(key, place) if place else key for key, place in keys])
    # One by one, so that a member of the first site starts with the same bits alone and in a stack.
    params = lax.map(lambda args: one(*args), (key_M, jnp.asarray(bias_MxD)))
    return TrainState(
        params,
        jax.vmap(make_optimizer(config, dictionary.widths).init)(params),
        jnp.zeros((len(members), dictionary.n_features), jnp.int32),
        jnp.zeros(len(members), config.state_dtype),
        jnp.zeros(len(members), jnp.int32),
    )


def with_shardings(
    state: TrainState, dictionary: DictionaryConfig, mesh: Mesh, zero_optimizer: bool = False
) -> TrainState:
    """The shapes of a state with the sharding of each: members over ``member``, features over ``model``.

    Arrays that stand alone, as those of a cross-layer transcoder's layers do, have no axis over members.

    Args:
      state: arrays, or their shapes.
      dictionary: what the members have in common.
      mesh: the devices.
      zero_optimizer: whether the optimizer's matrices are split over ``data`` too, along their other axis.
    """
    specs = {name: spec for name, (_, spec) in parameter_table(dictionary).items()}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        spec = next((specs[name] for name in names if name in specs), (None,) * max(leaf.ndim - 1, 0))
        spec = ("model",) if names[0] == "silent_MxF" else spec
        if zero_optimizer and names[0] == "optimizer":
            spec = _over_data(spec)
        where = fitting_sharding(mesh, leaf.shape, *["member"] * (leaf.ndim - len(spec)), *spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, state)


def placed_update(arrays: Arrays, dictionary: DictionaryConfig, mesh: Mesh, *, over_data: bool) -> Arrays:
    """One member's gradients or parameters, placed as ``with_shardings`` places an optimizer that is split, or them.

    Said both before and after an update it lets devices sum the part of the gradients that each needs, and send nothing
    but new parameters.

    Args:
      arrays: by name, without an axis over members; to be traced.
      dictionary: what the members have in common.
      mesh: the devices.
      over_data: as the optimizer is; else as parameters are.
    """
    inside = jax.sharding.get_abstract_mesh()  # of a part of the mesh that another axis has split already
    mesh, table = (mesh if inside.empty else inside), parameter_table(dictionary)

    def place(name: str, array: jax.Array) -> jax.Array:
        spec = table[name][1]
        spec = _over_data(spec) if over_data else spec
        return lax.with_sharding_constraint(array, fitting_sharding(mesh, array.shape, *spec))

    return {name: place(name, array) for name, array in arrays.items()}


def _over_data(spec: Sequence[str | None]) -> tuple[str | None, ...]:
    """Of matrices of features, split along their other axis too."""
    return tuple(axis or "data" for axis in spec) if "model" in spec else tuple(spec)


def finished(
    config: TrainConfig, dictionary: DictionaryConfig, member: Member, scale: SiteScale, arrays: Arrays, kept: jax.Array
) -> Dictionary:
    """A member's trained dictionary, for raw activations; decoder rows that grew freely are brought to length 1.

    Args:
      config: how it was trained.
      dictionary: what the members have in common.
      member, scale: which one it is, and the scales of its site.
      arrays: as trained, for scaled activations.
      kept: running mean of the smallest activation that a batch kept.
    """
    kind = kinds.by_name(dictionary.kind)
    arrays = rescale.unit_rows(kind, kind.finish(arrays, kept), dictionary.widths)
    described = dataclasses.replace(
        dictionary,
        site=member.site,
        target="" if member.target == member.site else member.target,
        k=member.settings.get("k", 0),
        fires_above=dictionary.fires_above / scale.output,
        max_norm=scale.max_norm,
        target_max_norm=None if member.target == member.site else scale.target_max_norm,
        scales=scale.scales,
        max_norms=scale.max_norms,
    )
    return Dictionary(described, config.matmul, **rescale.fold_input_scaling(kind, arrays, scale.input, scale.output))
