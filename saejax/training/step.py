"""One training step of a stack: a pure function (state, hyperparameters, batch) -> (state, metrics).

The loss and the step of one member are written once; a stack is ``map_over_members`` of the step.

    loss = squared error of each reconstruction          (whitened if asked for)
         + penalty of the kind, and its further terms
         + auxk * AuxK + decorrelation * decorrelation + alignment * alignment

The terms are defined in ``dictionaries.losses`` and ``dictionaries.kinds``.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from saejax.dictionaries import Dictionary, losses
from saejax.dictionaries.kinds.base import Arrays, EncodedBatch
from saejax.dictionaries.sparse_products import Encoder, SparseCode, explain
from saejax.parallel.mesh import sharding
from saejax.training import cross_layer, resampling
from saejax.training.optimizer import penalty_schedule
from saejax.training.stack import Hyperparams, TrainStack
from saejax.training.state import TrainState, apply_update, place_update, state_shardings
from saejax.training.widening import alignment

Batch = tuple[jax.Array, ...]
Step = Callable[[TrainState, Hyperparams, Batch], tuple[TrainState, Arrays]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemberBatch:
    """A batch of one member, and what else its loss depends on besides its arrays."""

    #: x_BxD and y_BxD: scaled inputs and targets.
    x_BxD: jax.Array
    y_BxD: jax.Array
    hyper: Hyperparams  #: the member's hyperparameters, scalars
    step: jax.Array  #: number of steps done
    dead_F: jax.Array  #: True for features that have been silent for too long
    #: the largest number of dead features among the members computed together; None: this member's.
    most_dead: jax.Array | None = None


def compile_step(stack: TrainStack) -> Step:
    """Return ``train_step`` of a stack, jitted; the state is donated."""
    step = functools.partial(train_step, stack)
    # Donated: parameters and optimiser states fill most of the memory, and a step needs no copy of them.
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(stack), sharding(stack.mesh)))


def train_step(stack: TrainStack, state: TrainState, hyper: Hyperparams, batch: Batch) -> tuple[TrainState, Arrays]:
    """Do one step of all members.

    Args:
      stack: what is trained.
      state: the state before the step.
      hyper: ``stack.hyperparams``.
      batch: raw inputs [sites, B, D] in the order of ``stack.sites``, and for transcoders the targets.

    Returns:
      The next state, and metrics [M].
    """
    if stack.is_cross_layer:
        return cross_layer.train_step(stack, state, hyper, batch)
    with jax.sharding.use_abstract_mesh(stack.mesh.abstract_mesh):
        # Members at the same time take one branch of AuxK's condition, because sums over the mesh's other axes stand in
        # it; members in turn each take their own.
        most_dead = []
        if stack.members_at_once > 1 or stack.mesh.shape["member"] > 1:
            most_dead = [jnp.max(jnp.sum(state.silent_MxF >= stack.config.dead_tokens, axis=-1))]
        after, metrics = _map_over_batch(stack, _member_step, state, (hyper,), batch, *most_dead)
        if stack.config.resample_every:
            # All members have done the same number of steps, so the condition is one scalar.
            due = resampling.is_due(stack.config, stack.steps, after.step_M[0])

            def resample(state: TrainState) -> tuple[TrainState, tuple[()]]:
                return _map_over_batch(stack, _resample, state, (hyper,), batch)

            after, _ = lax.cond(due, resample, lambda state: (state, ()), after)
    return after, metrics


def _member_step(
    stack: TrainStack,
    state: TrainState,
    hyper: Hyperparams,
    x_BxD: jax.Array,
    y_BxD: jax.Array,
    most_dead: jax.Array | None = None,
) -> tuple[TrainState, Arrays]:
    """Do the step of one member: gradient, then update; arrays have no axis over members here."""
    params, dead_F = state.params, state.silent_MxF >= stack.config.dead_tokens
    if stack.config.zero_optimizer:
        # Whole again before the products: between steps parameters may lie as the optimiser's parts do.
        params = place_update(params, stack.dictionary, stack.mesh, over_data=False)
    gradient = jax.grad(functools.partial(member_loss, stack), has_aux=True)
    batch = MemberBatch(x_BxD, y_BxD, hyper, state.step_M, dead_F, most_dead)
    grads, (metrics, fired_F) = gradient(params, batch)
    state, update_metrics = apply_update(stack, state, grads, fired_F, hyper.learning_rate, len(x_BxD))
    return state, metrics | update_metrics


def _resample(
    stack: TrainStack, state: TrainState, hyper: Hyperparams, x_BxD: jax.Array, y_BxD: jax.Array
) -> tuple[TrainState, tuple[()]]:
    error_BxD = member_residual(stack, state.params, x_BxD, y_BxD, hyper)
    # Features on any device pick tokens of all: JAX 0.11's compiler crashes where it is to find out how.
    batch = lax.with_sharding_constraint((x_BxD, y_BxD, error_BxD), sharding(stack.mesh))
    return resampling.resample(stack.config, stack.dictionary, state, hyper, *batch), ()


def member_loss(stack: TrainStack, params: Arrays, batch: MemberBatch) -> tuple[jax.Array, tuple[Arrays, jax.Array]]:
    """Return the loss of one member on one batch.

    Args:
      stack: what is trained.
      params: the member's arrays, as in ``parameter_table``.
      batch: the tokens of the step.

    Returns:
      The loss, and (metrics, whether each feature fired on any token).
    """
    config, member = stack.config, Dictionary(stack.dictionary, stack.config.matmul, **params)
    kind, settings = member.kind, config.of_kind(member.kind.name)
    x_BxD, y_BxD, hyper, dead_F = batch.x_BxD, batch.y_BxD, batch.hyper, batch.dead_F
    most_dead = jnp.sum(dead_F) if batch.most_dead is None else batch.most_dead
    pre_BxF, pre_for_auxk_BxF, acts, residuals = _encode(stack, member, x_BxD, y_BxD, hyper, most_dead > 0)
    if isinstance(acts, SparseCode):
        f_BxF, firings_F = acts.dense(), acts.firings()
    else:
        # In floats, because XLA:CPU vectorises no sums of integers; exact up to 2^24 tokens.
        f_BxF, firings_F = acts, jnp.sum(member.fires(acts).astype(jnp.float32), axis=0)
    errors = [losses.squared_size(error_BxD, hyper.metric_DxD, config.matmul) for error_BxD in residuals]
    error_BxD = residuals[-1]

    encoded = EncodedBatch(member, x_BxD, y_BxD, pre_BxF, f_BxF, dead_F, hyper.metric_DxD, hyper.kind_params, settings)
    terms = dict(error=sum(errors[1:], errors[0]))
    penalty = kind.penalty(encoded)
    if penalty is not None:
        terms["sparsity"] = penalty * penalty_schedule(config, stack.steps)(batch.step)
    terms |= kind.losses(encoded)
    if config.auxk:
        k = config.auxk_features or max(stack.dictionary.d_in // 2, 1)
        # Split features stay on their devices, and a TPU's vector units move no single columns.
        all_columns = stack.mesh.shape["model"] > 1 or stack.platform == "tpu"
        fixed = error_BxD, k, config.matmul, hyper.metric_DxD, most_dead, all_columns
        terms["auxk"] = config.auxk * losses.auxk(pre_for_auxk_BxF, dead_F, params["W_dec_FxD"], *fixed)
    if config.decorrelation:
        terms["decorrelation"] = config.decorrelation * losses.decorrelation(f_BxF)
    if config.alignment:
        terms["alignment"] = config.alignment * alignment(params["W_enc_DxF"], params["W_dec_FxD"])
    loss = sum(terms.values(), jnp.zeros((), y_BxD.dtype))

    metrics = terms | dict(
        loss=loss,
        mse=losses.squared_size(error_BxD),
        l0=jnp.sum(firings_F) / x_BxD.shape[0],
        explained_variance=losses.explained_variance(y_BxD, error_BxD),
    )
    return loss, (metrics, firings_F > 0)


def member_residual(
    stack: TrainStack, params: Arrays, x_BxD: jax.Array, y_BxD: jax.Array, hyper: Hyperparams
) -> jax.Array:
    """Return targets ``y_BxD`` minus one member's reconstruction from ``x_BxD``, features chosen as in training."""
    member = Dictionary(stack.dictionary, stack.config.matmul, **params)
    return _encode(stack, member, x_BxD, y_BxD, hyper)[-1][-1]


def _encode(
    stack: TrainStack,
    member: Dictionary,
    x_BxD: jax.Array,
    y_BxD: jax.Array,
    hyper: Hyperparams,
    any_dead: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | SparseCode, list[jax.Array]]:
    """Encode and reconstruct as in training.

    Returns:
      Pre-activations, for the kind's losses and for AuxK; activations; the residual of each reconstruction.
    """
    arrays, kind = member.arrays, member.kind
    if stack.products != "dense":
        centre_D = arrays["b_dec_D"] if stack.dictionary.centred else jnp.zeros_like(arrays["b_dec_D"])
        encoder = Encoder(centre_D, arrays["W_enc_DxF"], arrays["b_enc_F"])
        rest = hyper.kind_params["k"], stack.dictionary.k, stack.config.matmul, any_dead
        explained = explain(x_BxD, member.without_bias(y_BxD, x_BxD), encoder, arrays["W_dec_FxD"], *rest)
        return explained.pre_BxF, explained.pre_for_auxk_BxF, explained.code, [explained.residual_BxD]
    inputs, settings = member.encoder_inputs(x_BxD), stack.config.of_kind(stack.dictionary.kind)
    f_BxF = kind.encode_in_training(member, inputs, hyper.kind_params, settings)
    residuals = [y_BxD - y_hat_BxD for y_hat_BxD in kind.reconstructions(member, f_BxF, x_BxD)]
    return inputs.pre_xF, inputs.pre_xF, f_BxF, residuals


# A stack: one member's function over the leading axis.


def measure_members(
    stack: TrainStack, measure: Callable, params: Arrays, hyper: Hyperparams, batch: Batch, *more: jax.Array
) -> Any:
    """Return ``measure(params, hyper, x_BxD, y_BxD, *more)`` of each member, on its own device, with its scaled values.

    Members of a device take turns, so that one member's memory suffices.

    Args:
      stack: what is trained.
      measure: a function of one member, whose hyperparameters have no metric here.
      params: arrays of all members.
      hyper: ``stack.hyperparams``.
      batch: as in ``train_step``.
      more: further arrays of all members, [M, ...].
    """

    def apply(_: TrainStack, index: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
        hyper, x_BxD, y_BxD, params, *more = args
        return index, measure(params, hyper, x_BxD, y_BxD, *more)

    # Parameters are read only: as a state that turns write to they would be copied.
    per_member = dataclasses.replace(hyper, metric_DxD=None), params, *more  # the metric is not read here
    one_by_one = dataclasses.replace(stack, config=dataclasses.replace(stack.config, members_at_once=1))
    with jax.sharding.use_abstract_mesh(stack.mesh.abstract_mesh):
        _, measured = _map_over_batch(one_by_one, apply, hyper.site_index, per_member, batch)
    return measured


def _map_over_batch(
    stack: TrainStack, apply: Callable, state: Any, per_member: tuple[Any, ...], batch: Batch, *common: jax.Array
) -> tuple[Any, Any]:
    """Map ``apply(stack, state, hyper, x_BxD, y_BxD, *common, *read_only)`` over members, each with its scaled values.

    ``per_member`` is (hyper, *read_only), arrays of all members, of which each gets its own.
    """
    hyper, *read_only = per_member
    count, dtype, metric_SxDxD = len(common), stack.config.state_dtype, hyper.metric_DxD

    def apply_to_member(state: Any, per_member: Any, *shared: jax.Array) -> tuple[Any, Any]:
        (hyper, values, read_only), common, shared = per_member, shared[:count], shared[count:]
        if values is None:
            # Several members read one site: each picks it from the batch, which is there once.
            values = [lax.dynamic_index_in_dim(each_Sx, hyper.site_index, keepdims=False) for each_Sx in shared]
            if metric_SxDxD is not None:
                # Of one site not by its index: members at the same time would each get a copy.
                metric_DxD = shared[-1][0] if len(stack.sites) == 1 else values[-1]
                hyper, values = dataclasses.replace(hyper, metric_DxD=metric_DxD), values[:-1]
        x_BxD = values[0].astype(dtype) * hyper.input_scale
        y_BxD = values[1].astype(dtype) * hyper.output_scale if len(values) > 1 else x_BxD
        return apply(stack, state, hyper, x_BxD, y_BxD, *common, *read_only)

    placement = stack.mesh, stack.members_at_once
    if len(stack.sites) == len(stack.members):  # each member has its own values, on its own devices
        return map_over_members(apply_to_member, state, (hyper, batch, read_only), common, *placement)
    once = batch if metric_SxDxD is None else (*batch, metric_SxDxD)
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
