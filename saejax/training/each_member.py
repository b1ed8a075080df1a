"""One function for every member of a stack: split over devices, and on each of them vectorised or in turn."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

_VALUES = 2**26  # of tokens by features, of members that are vectorised: 256 MB in float32, and several times that


def members_at_once(
    asked: int, members: int, tokens: int, features: int, axes: Mapping[str, int], platform: str
) -> int:
    """How many members a device vectorises; the others wait for their turn.

    Those of a CPU go one by one: batched matrix products are slower there than their parts. Accelerators take as many
    as hold ``_VALUES`` values of tokens by features, for small products leave them idle between launches, and products
    of that size do not.

    Args:
      asked: at most so many; 0: as is best.
      members: of the stack, which ``member`` of the mesh divides.
      tokens, features: of a step and of a member, over all devices.
      axes: sizes of the mesh's axes.
      platform: of its devices, such as "cpu".

    Returns:
      A divisor of the members that a device has.
    """
    own = members // axes["member"]
    if not asked:
        values = math.ceil(tokens / axes["data"]) * math.ceil(features / axes["model"])
        asked = 1 if platform == "cpu" else max(_VALUES // values, 1)
    return max(size for size in range(1, min(asked, own) + 1) if own % size == 0)


def each_member(one: Any, state: Any, own: Any, shared: Sequence[jax.Array], mesh: Mesh, at_once: int) -> Any:
    """Applies ``one(state, own, *shared) -> (state, told)`` to every member.

    Members in turn write their states in each other's place, so that no second copy of all states is made.

    Args:
      one: a function of trees whose arrays have no member axis.
      state, own: trees of arrays with a leading axis over members, split over the mesh's ``member`` axis.
      shared: what all members read, the same for each.
      mesh: the devices.
      at_once: members that are vectorised, a divisor of those of a device.

    Returns:
      The states, and what was told of each, with that axis.
    """

    def few(state: Any, own: Any, *shared: jax.Array) -> Any:
        if at_once > 1:
            return jax.vmap(one, in_axes=(0, 0, *[None] * len(shared)))(state, own, *shared)
        state, own = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (state, own))
        return jax.tree.map(lambda leaf: leaf[None], one(state, own, *shared))

    def local(state: Any, own: Any, *shared: jax.Array) -> Any:
        count = jax.tree.leaves(state)[0].shape[0]
        if count == at_once:
            return few(state, own, *shared)

        def turn(state: Any, first: jax.Array) -> tuple[Any, Any]:
            after, told = few(_rows(state, first, at_once), _rows(own, first, at_once), *shared)
            return jax.tree.map(functools.partial(_write, first), state, after), told

        state, told = lax.scan(turn, state, jnp.arange(0, count, at_once))
        return state, jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), told)

    if mesh.shape["member"] == 1:
        return local(state, own, *shared)
    by_member, everywhere = PartitionSpec("member"), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_member, by_member, *[everywhere] * len(shared)),
        out_specs=by_member,
        axis_names={"member"},
        check_vma=False,
    )(state, own, *shared)


def _rows(tree: Any, first: jax.Array, count: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count), tree)


def _write(first: jax.Array, leaf: jax.Array, rows: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(leaf, rows, first, 0)
