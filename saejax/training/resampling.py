"""Dead features start again at what the dictionary explains worst, as in Bricken et al. (2023), "neuron resampling".

Every ``resample_every`` steps, for each feature that has been silent for ``dead_tokens``:

    a token of the batch is drawn with a probability in proportion to its squared loss, none for two features
    decoder row      the direction of the token's target, less the decoder's bias
    encoder column   the direction of its input, less the bias, 0.2 times as long as the living columns' mean
    other arrays     what they were at the start, most of them 0
    Adam's moments   0, of all these

They look at 819,200 tokens, we at one batch; features for which it has no token wait for the next time.

With ``resample_from=errors`` rows are directions of what the dictionary leaves of the targets. A token is a sum of many
features, most of which the dictionary has: its error is nearer to one that it lacks. An SAE's encoder columns are the
same directions, all of them as long as the living columns' mean, or hardly one would pass a threshold.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from saejax.dictionaries import DictionaryConfig, kinds
from saejax.dictionaries.joined import row_lengths
from saejax.dictionaries.modules import parameter_table
from saejax.settings import TrainConfig
from saejax.training.members import Hyper
from saejax.training.state import TrainState

_LENGTH = 0.2  # of an encoder column that starts at a token, in those of the living


def due(config: TrainConfig, steps: int, step: jax.Array) -> jax.Array:
    """Whether dead features start again after ``step`` steps; not while the learning rate falls, nor at the end."""
    last = steps - max(round(config.decay * steps), 1)
    return (step % config.resample_every == 0) & (step <= last)


def resampled(
    config: TrainConfig,
    dictionary: DictionaryConfig,
    state: TrainState,
    hyper: Hyper,
    x_BxD: jax.Array,
    y_BxD: jax.Array,
    error_BxD: jax.Array,
) -> TrainState:
    """A member's state, a ``TrainState`` without member axis, with its dead features started again.

    Args:
      dictionary: what the member is.
      state: after the step on this batch.
      hyper: the member's own settings.
      x_BxD, y_BxD: scaled inputs and targets.
      error_BxD: what the member leaves of the targets.
    """
    params, rows = state.params, config.resample_from
    offset_BxD = x_BxD - params["b_dec_D"][None] if dictionary.centred else x_BxD
    targets_BxD = _directions(error_BxD if rows == "errors" else y_BxD - params["b_dec_D"][None])
    inputs_BxD = targets_BxD if rows == "errors" and not dictionary.target else _directions(offset_BxD)
    has_direction_B = jnp.any(inputs_BxD != 0, axis=-1) & jnp.any(targets_BxD != 0, axis=-1)
    loss_B = jnp.sum(jnp.square(error_BxD), axis=-1) * has_direction_B
    silent_F = state.silent_MxF >= config.dead_tokens
    dead_F, chosen_F = _drawn(hyper, state.step_M, loss_B, silent_F)
    length = (1.0 if rows == "errors" else _LENGTH) * _mean_length(params["W_enc_DxF"], silent_F)
    start = kinds.by_name(dictionary.kind).start(config.of_kind(dictionary.kind))
    started = {name: jnp.full_like(value, start.get(name, 0.0)) for name, value in params.items()}
    started |= dict(
        W_enc_DxF=length * inputs_BxD[chosen_F].T, W_dec_FxD=_rows(targets_BxD[chosen_F], dictionary.widths)
    )
    table = parameter_table(dictionary)
    by_feature = {name: spec.index("model") for name, (_, spec) in table.items() if "model" in spec}

    def replaced(name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        if name not in by_feature:
            return old
        shape = [1] * old.ndim
        shape[by_feature[name]] = dead_F.shape[0]
        return jnp.where(dead_F.reshape(shape), new, old)

    def forgotten(path: Any, moment: jax.Array) -> jax.Array:
        name = next((key.key for key in path if getattr(key, "key", None) in by_feature), "")
        return replaced(name, moment, jnp.zeros_like(moment))

    return dataclasses.replace(
        state,
        params={name: replaced(name, value, started[name]) for name, value in params.items()},
        optimizer=jax.tree_util.tree_map_with_path(forgotten, state.optimizer),
        silent_MxF=jnp.where(dead_F, 0, state.silent_MxF),
    )


def _drawn(hyper: Hyper, step: jax.Array, loss_B: jax.Array, dead_F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each dead feature a token of its own, drawn in proportion to the square of its loss; random in seed and step.

    Returns:
      Which features get one: where there are fewer tokens than dead features, the first ones; and which token.
    """
    key = jax.random.fold_in(jax.random.key(hyper.seed), step)
    weight_B = jnp.square(loss_B / jnp.maximum(jnp.max(loss_B), 1e-30))
    order_B = jnp.argsort(-(jnp.log(weight_B) + jax.random.gumbel(key, weight_B.shape, weight_B.dtype)))
    rank_F = jnp.cumsum(dead_F) - 1
    drawn_F = dead_F & (rank_F < jnp.sum(weight_B > 0))
    return drawn_F, order_B[jnp.clip(rank_F, 0, weight_B.shape[0] - 1)]


def _directions(values_BxD: jax.Array) -> jax.Array:
    """Rows of length 1; 0 where they were."""
    length_Bx1 = jnp.linalg.norm(values_BxD, axis=-1, keepdims=True)
    return values_BxD / jnp.maximum(length_Bx1, 1e-30)


def _rows(rows_FxD: jax.Array, widths: Sequence[int]) -> jax.Array:
    """Rows of length 1 of those of norm 1, which over the parts of a joined site is less."""
    return rows_FxD / jnp.maximum(row_lengths(rows_FxD, widths), 1e-30)[:, None] if widths else rows_FxD


def _mean_length(W_enc_DxF: jax.Array, dead_F: jax.Array) -> jax.Array:
    """Mean length of the living features' columns; of all where none lives."""
    living_F = jnp.where(jnp.all(dead_F), True, ~dead_F)
    return jnp.sum(jnp.linalg.norm(W_enc_DxF, axis=0) * living_F) / jnp.sum(living_F)
