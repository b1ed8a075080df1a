"""One training step of a stack: a pure function (state, hyperparameters, batch) -> (state, metrics).

The loss and the step are those of one member; ``over_members`` says how a stack's devices share its members.

    loss = squared error of each reconstruction          (whitened if asked for)
         + penalty of the kind, and its further terms
         + auxk * AuxK + decorrelation * decorrelation + alignment * alignment

The terms are defined in ``dictionaries.losses`` and ``dictionaries.kinds``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries import Dictionary, losses
from saejax.dictionaries.kinds.base import Arrays, EncodedBatch
from saejax.dictionaries.sparse_products import Encoder, SparseCode, explain
from saejax.parallel.mesh import sharding
from saejax.reductions import sum_tokens
from saejax.training import cross_layer, resampling
from saejax.training.optimizer import penalty_schedule
from saejax.training.over_members import Batch, map_over_batch
from saejax.training.stack import Hyperparams, TrainStack
from saejax.training.state import TrainState, apply_update, place_update, state_shardings
from saejax.training.widening import alignment

Step = Callable[[TrainState, Hyperparams, Batch], tuple[TrainState, Arrays]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemberBatch:
    """A batch of one member, and what else its loss depends on besides its arrays."""

    #: x_BxD and y_BxO: scaled inputs and targets.
    x_BxD: jax.Array
    y_BxO: jax.Array
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
        after, metrics = map_over_batch(stack, _member_step, state, (hyper,), batch, *most_dead)
        if stack.config.resample_every:
            # All members have done the same number of steps, so the condition is one scalar.
            due = resampling.is_due(stack, after.step_M[0])

            def resample(state: TrainState) -> tuple[TrainState, tuple[()]]:
                return map_over_batch(stack, _resample, state, (hyper,), batch)

            after, _ = lax.cond(due, resample, lambda state: (state, ()), after)
    return after, metrics


def _member_step(
    stack: TrainStack,
    state: TrainState,
    hyper: Hyperparams,
    x_BxD: jax.Array,
    y_BxO: jax.Array,
    most_dead: jax.Array | None = None,
) -> tuple[TrainState, Arrays]:
    """Do the step of one member: gradient, then update; arrays have no axis over members here."""
    params, dead_F = state.params, state.silent_MxF >= stack.config.dead_tokens
    if stack.config.zero_optimizer:
        # Whole again before the products: between steps parameters may lie as the optimiser's parts do.
        params = place_update(params, stack.dictionary, stack.mesh, over_data=False)
    gradient = jax.grad(functools.partial(member_loss, stack), has_aux=True)
    batch = MemberBatch(x_BxD, y_BxO, hyper, state.step_M, dead_F, most_dead)
    grads, (metrics, fired_F) = gradient(params, batch)
    state, update_metrics = apply_update(stack, state, grads, fired_F, hyper.learning_rate, len(x_BxD))
    return state, metrics | update_metrics


def _resample(
    stack: TrainStack, state: TrainState, hyper: Hyperparams, x_BxD: jax.Array, y_BxO: jax.Array
) -> tuple[TrainState, tuple[()]]:
    error_BxO = member_residual(stack, state.params, x_BxD, y_BxO, hyper)
    # Features on any device pick tokens of all: JAX 0.11's compiler crashes where it is to find out how.
    batch = lax.with_sharding_constraint((x_BxD, y_BxO, error_BxO), sharding(stack.mesh))
    return resampling.resample(stack, state, hyper, *batch), ()


class LossTerms(NamedTuple):
    """The terms of a member's loss on a batch, and what else its metrics are made of."""

    terms: Arrays  #: scalars by name, which add up to the loss
    residual_BxO: jax.Array  #: targets minus the reconstruction by all features, scaled
    firings_F: jax.Array  #: number of tokens on which each feature fires

    def metrics(self, loss: jax.Array, y_BxO: jax.Array) -> Arrays:
        """Return the terms, the ``loss`` and figures of the reconstruction of the targets ``y``."""
        return self.terms | dict(
            loss=loss,
            mse=losses.squared_size(self.residual_BxO),
            l0=jnp.sum(self.firings_F) / y_BxO.shape[0],
            explained_variance=losses.explained_variance(y_BxO, self.residual_BxO),
        )


def member_loss(stack: TrainStack, params: Arrays, batch: MemberBatch) -> tuple[jax.Array, tuple[Arrays, jax.Array]]:
    """Return the loss of one member on one batch.

    For the arguments see ``loss_terms``.

    Returns:
      The loss, and (metrics, whether each feature fired on any token).
    """
    parts = loss_terms(stack, params, batch)
    loss = sum(parts.terms.values(), jnp.zeros((), batch.y_BxO.dtype))
    return loss, (parts.metrics(loss, batch.y_BxO), parts.firings_F > 0)


def loss_terms(stack: TrainStack, params: Arrays, batch: MemberBatch) -> LossTerms:
    """Return the terms of the loss of one member on one batch.

    Args:
      stack: what is trained.
      params: the member's arrays, as in ``parameter_table``.
      batch: the tokens of the step.
    """
    config, member = stack.config, Dictionary(stack.dictionary, stack.config.matmul, **params)
    kind, settings = member.kind, config.of_kind(member.kind.name)
    x_BxD, y_BxO, hyper, dead_F = batch.x_BxD, batch.y_BxO, batch.hyper, batch.dead_F
    most_dead = jnp.sum(dead_F) if batch.most_dead is None else batch.most_dead
    pre_BxF, pre_for_auxk_BxF, acts, residuals = _encode(stack, member, x_BxD, y_BxO, hyper, most_dead > 0)
    if isinstance(acts, SparseCode):
        f_BxF, firings_F = acts.dense(), acts.firings()
    else:
        # In floats, because XLA's compiler for CPUs vectorises no sums of integers; exact up to 2^24 tokens.
        f_BxF, firings_F = acts, sum_tokens(member.fires(acts).astype(jnp.float32))
    errors = [losses.squared_size(error_BxO, hyper.metric_DxD, config.matmul) for error_BxO in residuals]
    error_BxO = residuals[-1]

    encoded = EncodedBatch(member, x_BxD, y_BxO, pre_BxF, f_BxF, dead_F, hyper.metric_DxD, hyper.kind_params, settings)
    terms = dict(error=sum(errors[1:], errors[0]))
    penalty = kind.penalty(encoded)
    if penalty is not None:
        terms["sparsity"] = penalty * penalty_schedule(config, stack.steps)(batch.step)
    terms |= kind.losses(encoded)
    if config.auxk:
        k = config.auxk_features or max(stack.dictionary.d_out // 2, 1)
        # Split features stay on their devices, and a TPU's vector units move no single columns.
        all_columns = stack.mesh.shape["model"] > 1 or stack.platform == "tpu"
        fixed = error_BxO, losses.AuxKForm(k, config.matmul, all_columns), hyper.metric_DxD, most_dead
        terms["auxk"] = config.auxk * losses.auxk(pre_for_auxk_BxF, dead_F, params["W_dec_FxD"], *fixed)
    if config.decorrelation:
        terms["decorrelation"] = config.decorrelation * losses.decorrelation(f_BxF)
    if config.alignment:
        terms["alignment"] = config.alignment * alignment(params["W_enc_DxF"], params["W_dec_FxD"])
    return LossTerms(terms, error_BxO, firings_F)


def member_residual(
    stack: TrainStack, params: Arrays, x_BxD: jax.Array, y_BxO: jax.Array, hyper: Hyperparams
) -> jax.Array:
    """Return targets ``y_BxO`` minus one member's reconstruction from ``x_BxD``, features chosen as in training."""
    member = Dictionary(stack.dictionary, stack.config.matmul, **params)
    return _encode(stack, member, x_BxD, y_BxO, hyper)[-1][-1]


def _encode(
    stack: TrainStack,
    member: Dictionary,
    x_BxD: jax.Array,
    y_BxO: jax.Array,
    hyper: Hyperparams,
    any_dead: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | SparseCode, list[jax.Array]]:
    """Encode and reconstruct as in training.

    Returns:
      Pre-activations, for the kind's losses and for AuxK; activations; the residual of each reconstruction.
    """
    arrays, kind = member.arrays, member.kind
    if stack.products != "dense":
        centre_D = arrays["b_dec_D"] if stack.dictionary.centred else jnp.zeros(x_BxD.shape[1:], x_BxD.dtype)
        encoder = Encoder(centre_D, arrays["W_enc_DxF"], arrays["b_enc_F"])
        rest = hyper.kind_params["k"], stack.dictionary.k, stack.config.matmul, any_dead
        explained = explain(x_BxD, member.without_bias(y_BxO, x_BxD), encoder, arrays["W_dec_FxD"], *rest)
        return explained.pre_BxF, explained.pre_for_auxk_BxF, explained.code, [explained.residual_BxO]
    inputs, settings = member.encoder_inputs(x_BxD), stack.config.of_kind(stack.dictionary.kind)
    f_BxF = kind.encode_in_training(member, inputs, hyper.kind_params, settings)
    residuals = [y_BxO - y_hat_BxO for y_hat_BxO in kind.reconstructions(member, f_BxF, x_BxD)]
    return inputs.pre_xF, inputs.pre_xF, f_BxF, residuals
