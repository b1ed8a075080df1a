"""One member's function over all members of a stack: on which devices, how many at a time, and with which values.

A function of one member knows no axis over members. Here each gets its own parameters, hyperparameters and scaled
values of its sites.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from saejax.dictionaries.kinds.base import Arrays
from saejax.parallel.mesh import sharding
from saejax.training.stack import Hyperparams, TrainStack

Batch = tuple[jax.Array, ...]


def measure_members(
    stack: TrainStack, measure: Callable, params: Arrays, hyper: Hyperparams, batch: Batch, *more: jax.Array
) -> Any:
    """Return ``measure(params, hyper, x_BxD, y_BxO, *more)`` of each member, on its own device, with its scaled values.

    Members of a device take turns, so that one member's memory suffices.

    Args:
      stack: what is trained.
      measure: a function of one member, whose hyperparameters have no metric here.
      params: arrays of all members.
      hyper: ``stack.hyperparams``.
      batch: as in ``step.train_step``.
      more: further arrays of all members, [M, ...].
    """

    def apply(_: TrainStack, index: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
        hyper, x_BxD, y_BxO, params, *more = args
        return index, measure(params, hyper, x_BxD, y_BxO, *more)

    # Parameters are read only: as a state that turns write to they would be copied.
    per_member = dataclasses.replace(hyper, metric_DxD=None), params, *more  # the metric is not read here
    one_by_one = dataclasses.replace(stack, config=dataclasses.replace(stack.config, members_at_once=1))
    with jax.sharding.use_abstract_mesh(stack.mesh.abstract_mesh):
        _, measured = map_over_batch(one_by_one, apply, hyper.site_index, per_member, batch)
    return measured


def map_over_batch(
    stack: TrainStack, apply: Callable, state: Any, per_member: tuple[Any, ...], batch: Batch, *common: jax.Array
) -> tuple[Any, Any]:
    """Map ``apply(stack, state, hyper, x_BxD, y_BxO, *common, *read_only)`` over members, each with its scaled values.

    ``per_member`` is (hyper, *read_only), arrays of all members, of which each gets its own.
    """
    hyper, *read_only = per_member
    count, dtype, metric_SxOxO = len(common), stack.config.state_dtype, hyper.metric_DxD

    def apply_to_member(state: Any, per_member: Any, *shared: jax.Array) -> tuple[Any, Any]:
        (hyper, values, read_only), common, shared = per_member, shared[:count], shared[count:]
        if values is None:
            # Several members read one site: each picks it from the batch, which is there once.
            values = [lax.dynamic_index_in_dim(each_Sx, hyper.site_index, keepdims=False) for each_Sx in shared]
            if metric_SxOxO is not None:
                # Of one site not by its index: members at the same time would each get a copy.
                metric_OxO = shared[-1][0] if len(stack.sites) == 1 else values[-1]
                hyper, values = dataclasses.replace(hyper, metric_DxD=metric_OxO), values[:-1]
        if stack.batch_sharding.spec[2]:  # of the sites of members that wait, a device keeps its part of the vectors
            values = lax.with_sharding_constraint(values, sharding(stack.mesh, "data", None))
        x_BxD = values[0].astype(dtype) * hyper.input_scale
        y_BxO = values[1].astype(dtype) * hyper.output_scale if len(values) > 1 else x_BxD
        return apply(stack, state, hyper, x_BxD, y_BxO, *common, *read_only)

    placement = stack.mesh, stack.members_at_once
    if len(stack.sites) == len(stack.members):  # each member has its own values, on its own devices
        return map_over_members(apply_to_member, state, (hyper, batch, read_only), common, *placement)
    once = batch if metric_SxOxO is None else (*batch, metric_SxOxO)
    per_member = dataclasses.replace(hyper, metric_DxD=None), None, read_only
    return map_over_members(apply_to_member, state, per_member, (*common, *once), *placement)


def map_over_members(
    fn: Callable, state: Any, per_member: Any, broadcast: Sequence[jax.Array], mesh: Mesh, vmap_size: int
) -> Any:
    """Apply ``fn(state, per_member, *broadcast) -> (state, metrics)`` to every member.

    Members are split over the mesh's ``member`` axis. On each device, ``vmap_size`` of them at a time are vectorised;
    members in turn write their states in each other's place, so that no second copy of all states is made.

    Args:
      fn: a function of trees whose arrays have no axis over members.
      state: a tree of arrays with a leading axis over members.
      per_member: another such tree.
      broadcast: arrays that all members read.
      mesh: the devices.
      vmap_size: a divisor of the number of members of a device.

    Returns:
      The states and the metrics, with that axis.
    """

    def apply_together(state: Any, per_member: Any, *broadcast: jax.Array) -> Any:
        if vmap_size > 1:
            return jax.vmap(fn, in_axes=(0, 0, *[None] * len(broadcast)))(state, per_member, *broadcast)
        # Not as a stack of one, whose batched products are slower on a CPU.
        state, per_member = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (state, per_member))
        return jax.tree.map(lambda leaf: leaf[None], fn(state, per_member, *broadcast))

    def apply_on_device(state: Any, per_member: Any, *broadcast: jax.Array) -> Any:
        count = jax.tree.leaves(state)[0].shape[0]
        if count == vmap_size:
            return apply_together(state, per_member, *broadcast)

        def take(first: jax.Array, tree: Any) -> Any:
            return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, vmap_size), tree)

        def put(first: jax.Array, leaf: jax.Array, rows: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(leaf, rows, first, 0)

        def turn(carry: tuple[Any, Any], first: jax.Array) -> tuple[Any, Any]:
            """Apply ``fn`` to the members that were taken, put them back, and take the next ones."""
            state, members = carry
            after, metrics = apply_together(members, take(first, per_member), *broadcast)
            state = jax.tree.map(functools.partial(put, first), state, after)
            # Taken here, not where they are read: XLA would read them from the states of all members while it writes
            # those of one, and copy all of them at every turn.
            return (state, take(jnp.minimum(first + vmap_size, count - vmap_size), state)), metrics

        firsts = jnp.arange(0, count, vmap_size)
        (state, _), metrics = lax.scan(turn, (state, take(firsts[0], state)), firsts)
        return state, jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), metrics)

    if mesh.shape["member"] == 1:
        return apply_on_device(state, per_member, *broadcast)
    by_member, everywhere = PartitionSpec("member"), PartitionSpec()
    return jax.shard_map(
        apply_on_device,
        mesh=mesh,
        in_specs=(by_member, by_member, *[everywhere] * len(broadcast)),
        out_specs=by_member,
        axis_names={"member"},
        check_vma=False,
    )(state, per_member, *broadcast)
