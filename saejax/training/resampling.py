"""Neuron resampling: dead features start again at the tokens of the highest loss (Bricken et al., 2023).

Every ``resample_every`` steps, for each feature that has been silent for ``dead_tokens``:

    a token of the batch is drawn with probability proportional to its squared loss, without replacement
    decoder row      the direction of the token's target, less the decoder's bias
    encoder column   the direction of its input, less the bias, 0.2 times the mean length of the live columns
    other arrays     their initial values, most of them 0
    Adam's moments   0, for all these

Bricken et al. draw from 819,200 tokens, we from one batch; features for which it has no token wait for the next time.

With ``resample_from=errors`` rows are directions of the residuals. A token is a sum of many features, most of which the
dictionary has: its residual is nearer to a feature that it lacks. An SAE's encoder columns are the same directions, of
the live columns' mean length, or hardly one would pass a threshold.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from saejax.dictionaries.joined import row_lengths
from saejax.dictionaries.modules import parameter_table
from saejax.training.optimizer import decay_start
from saejax.training.stack import Hyperparams, TrainStack
from saejax.training.state import TrainState

_LENGTH = 0.2  # of an encoder column that starts at a token, as a share of the living features' length


def is_due(stack: TrainStack, step: jax.Array) -> jax.Array:
    """Return whether to resample after ``step`` steps; not while the learning rate falls, nor at the end."""
    return (step % stack.config.resample_every == 0) & (step <= decay_start(stack.config, stack.steps))


def resample(
    stack: TrainStack,
    state: TrainState,
    hyper: Hyperparams,
    x_BxD: jax.Array,
    y_BxO: jax.Array,
    error_BxO: jax.Array,
) -> TrainState:
    """Return a member's state, without member axis, with its dead features started again.

    Args:
      stack: what is trained.
      state: the member's state after the step on this batch.
      hyper: the member's hyperparameters.
      x_BxD: scaled inputs.
      y_BxO: scaled targets.
      error_BxO: the member's residuals of the targets.
    """
    config, dictionary, params = stack.config, stack.dictionary, state.params
    rows = config.resample_from
    offset_BxD = x_BxD - params["b_dec_D"][None] if dictionary.centred else x_BxD
    targets_BxO = _directions(error_BxO if rows == "errors" else y_BxO - params["b_dec_D"][None])
    inputs_BxD = targets_BxO if rows == "errors" and not dictionary.target else _directions(offset_BxD)
    # A token at the bias has no direction that a feature could start at.
    has_direction_B = jnp.any(inputs_BxD != 0, axis=-1) & jnp.any(targets_BxO != 0, axis=-1)
    loss_B = jnp.sum(jnp.square(error_BxO), axis=-1) * has_direction_B
    silent_F = state.silent_MxF >= config.dead_tokens
    dead_F, chosen_F = draw_tokens(hyper, state.step_M, loss_B, silent_F)
    # Short encoder columns keep a new feature from disturbing the others at once.
    live_F = jnp.where(jnp.all(silent_F), True, ~silent_F)  # all features where none is live
    length = jnp.sum(jnp.linalg.norm(params["W_enc_DxF"], axis=0) * live_F) / jnp.sum(live_F)
    length *= 1.0 if rows == "errors" else _LENGTH
    start = stack.kind.start(config.of_kind(dictionary.kind))
    started = {name: jnp.full_like(value, start.get(name, 0.0)) for name, value in params.items()}
    W_dec_FxO = targets_BxO[chosen_F]
    if dictionary.widths:  # over the parts of a joined site a row's length is not its norm
        W_dec_FxO /= jnp.maximum(row_lengths(W_dec_FxO, dictionary.widths), 1e-30)[:, None]
    started |= dict(W_enc_DxF=length * inputs_BxD[chosen_F].T, W_dec_FxD=W_dec_FxO)
    table = parameter_table(dictionary)
    by_feature = {name: spec.index("model") for name, (_, spec) in table.items() if "model" in spec}

    def replace_dead(name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        if name not in by_feature:
            return old
        shape = [1] * old.ndim
        shape[by_feature[name]] = dead_F.shape[0]
        return jnp.where(dead_F.reshape(shape), new, old)

    def reset_moment(path: Any, moment: jax.Array) -> jax.Array:
        name = next((key.key for key in path if getattr(key, "key", None) in by_feature), "")
        return replace_dead(name, moment, jnp.zeros_like(moment))

    return dataclasses.replace(
        state,
        params={name: replace_dead(name, value, started[name]) for name, value in params.items()},
        optimizer=jax.tree_util.tree_map_with_path(reset_moment, state.optimizer),
        silent_MxF=jnp.where(dead_F, 0, state.silent_MxF),
    )


def draw_tokens(
    hyper: Hyperparams, step: jax.Array, loss_B: jax.Array, dead_F: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw a distinct token for each dead feature, in proportion to the square of its loss; random in seed and step.

    Returns:
      Which features get a token (where there are fewer tokens than dead features, the first ones), and its index.
    """
    key = jax.random.fold_in(jax.random.key(hyper.seed), step)
    # Gumbel noise on log weights and a sort draw without replacement (Efraimidis and Spirakis, 2006).
    # Relative to the largest: small losses squared would be 0 in float32.
    weight_B = jnp.square(loss_B / jnp.maximum(jnp.max(loss_B), 1e-30))
    order_B = jnp.argsort(-(jnp.log(weight_B) + jax.random.gumbel(key, weight_B.shape, weight_B.dtype)))
    rank_F = jnp.cumsum(dead_F) - 1
    drawn_F = dead_F & (rank_F < jnp.sum(weight_B > 0))
    return drawn_F, order_B[jnp.clip(rank_F, 0, weight_B.shape[0] - 1)]


def _directions(values_BxD: jax.Array) -> jax.Array:
    """Return rows of length 1; zero rows stay zero."""
    length_Bx1 = jnp.linalg.norm(values_BxD, axis=-1, keepdims=True)
    return values_BxD / jnp.maximum(length_Bx1, 1e-30)
