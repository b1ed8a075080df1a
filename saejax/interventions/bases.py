"""Simpler bases of a site, whose directions are ablated in the same way as features.

- ``neurons``: the neurons of the MLP in the site's layer. A neuron's activation is an input of the down projection, its
  direction is its row there; ablating it changes ``mlp_out``. First tokens are left alone, as dictionaries leave
  attention sinks.
- ``pca``: the principal components of the site's values on the train prompts. Ablating one sets the value to the mean
  along it.
- ``diff_means``: differences of means. The site's value at the last position is averaged over the train prompts of each
  correct answer; the directions are the principal ones of these means around their mean, of two answers their
  difference. Ablating one sets the value to the mean along it, as with principal components.
- ``untrained``: a dictionary of random unit directions, as many as the dictionary has features, and as many active per
  position, the largest projections.

Published work finds neurons and random dictionaries close to trained ones on many scores; a dictionary whose top
features do no more than these has not earned its place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import placements
from saejax.models import decoder
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.layers import mlp_neurons

_WEIGHTS = ("gate_DxF", "gate_bias_F", "up_DxF", "up_bias_F")


class Neurons(Dictionary):
    """The neurons of an MLP: a dictionary that reads ``mlp_in`` by the model's weights and writes ``mlp_out``.

    Args:
      layer: layer of the MLP.
    """

    def __init__(self, model: LanguageModel, layer: int):
        weights = decoder.layer_params(model.params, layer)
        self.decoder = nnx.static(model.config)
        self.names = nnx.static(tuple(name for name in _WEIGHTS if name in weights))
        for name in self.names:
            setattr(self, name, nnx.Param(weights[name]))
        self.W_dec_FxD = nnx.Param(weights["down_FxD"])
        self.b_dec_D = nnx.Param(jnp.zeros_like(weights["down_FxD"][0]))
        self.matmul_dtype = nnx.static("float32")
        self.config = nnx.static(
            DictionaryConfig(
                kind="linear",
                site=f"mlp_in.{layer}",
                target=f"mlp_out.{layer}",
                d_in=model.config.d_model,
                n_features=model.config.d_mlp,
                model=model.source.name,
                fingerprint=model.source.fingerprint,
            )
        )

    def mesh_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the mesh axis over which each dimension of each array is split: the dimension of neurons."""
        axes: dict[str, tuple[str | None, ...]] = {
            name: (None, "model") if name.endswith("DxF") else ("model",) for name in self.names
        }
        return axes | dict(W_dec_FxD=("model", None))

    def encode(self, x_BxTxD: jax.Array, numbers: Any = None) -> jax.Array:
        """Return the neurons' activations [B, T, F]."""
        config: DecoderConfig = self.decoder
        return mlp_neurons(config, GRADIENT, {name: getattr(self, name)[...] for name in self.names}, x_BxTxD)

    def with_sink_norms(self, sink_norm: Callable[[str], float], replace: bool = False) -> "Neurons":
        """Return the neurons themselves: first tokens are left alone, whatever the norms."""
        return self

    def is_not_sink(self, x_BxTxD: jax.Array, y_xD: jax.Array | None = None) -> jax.Array:
        """Return True at every position but the first."""
        return jnp.broadcast_to(jnp.arange(x_BxTxD.shape[-2]) > 0, x_BxTxD.shape[:-1])


def linear(like: Dictionary, directions_FxD: np.ndarray, centre_D: np.ndarray | None = None) -> Dictionary:
    """Return F directions as a linear dictionary of the site that another one writes to.

    Args:
      like: the dictionary that gives the site and its sink rule.
      directions_FxD: the directions.
      centre_D: where a value stands from which all directions were removed; None: at 0.
    """
    count, width = directions_FxD.shape
    arrays = dict(W_enc_DxF=directions_FxD.T, b_enc_F=np.zeros(count), W_dec_FxD=directions_FxD)
    arrays["b_dec_D"] = np.zeros(width) if centre_D is None else centre_D
    config = _like(like, kind="linear", d_in=width, n_features=count)
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def principal_directions(like: Dictionary, rows_RxD: np.ndarray, values_NxD: np.ndarray) -> Dictionary | None:
    """Return the principal directions of some rows, without those of no size, around the mean of some values.

    Args:
      like: a dictionary that gives the site and its sink rule.
      rows_RxD: centred here.
      values_NxD: at least one.

    Returns:
      None where all rows are the same but for rounding.
    """
    centre_D = values_NxD.mean(axis=0, dtype=np.float64)
    # Of the rows instead of their covariance, which would square small directions into rounding errors.
    _, size_X, every_XxD = np.linalg.svd(rows_RxD - rows_RxD.mean(axis=0, dtype=np.float64), full_matrices=False)
    # What is left of equal rows is rounding, in directions that mean nothing.
    directions_FxD = every_XxD[size_X > 1e-6 * max(size_X.max(initial=0.0), np.linalg.norm(centre_D), 1e-30)]
    return linear(like, directions_FxD, centre_D) if len(directions_FxD) else None


def untrained(dictionary: Dictionary, active: int, seed: int) -> Dictionary:
    """Return a TopK dictionary of random directions at the same site, of the same size and centre.

    Args:
      dictionary: the dictionary that it is like.
      active: features active per position.
      seed: seed of the directions.
    """
    config = dictionary.config
    # The centre belongs to normalised tokens, so they are normalised here, too; a transcoder's target never is.
    norm: dict[str, Any] = {} if config.target else dict(input_norm=config.input_norm, output_units=config.output_units)
    # TopK, so that as many are active as in the dictionary, whose own kind has thresholds that only training sets.
    changed, mesh = _like(dictionary, kind="topk", k=max(active, 1), **norm), dictionary.mesh
    arrays = _initial_arrays(changed, mesh, jax.random.key(seed)) | dict(b_dec_D=dictionary.b_dec_D[...])
    return Dictionary(changed, **arrays)


def around_zero(dictionary: Dictionary) -> Dictionary:
    """Return a dictionary with its centre, the bias of its decoder, at zero."""
    arrays = dictionary.arrays
    return Dictionary(dictionary.config, **arrays | dict(b_dec_D=jnp.zeros_like(arrays["b_dec_D"])))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_arrays(config: DictionaryConfig, mesh: Mesh | None, key: jax.Array) -> dict[str, jax.Array]:
    """Return the arrays of a random dictionary, of which each device of a mesh makes its part."""
    arrays = Dictionary.initial(config, key).arrays
    return jax.lax.with_sharding_constraint(arrays, placements(config, mesh)) if mesh else arrays


def _like(dictionary: Dictionary, **changes: Any) -> DictionaryConfig:
    """Return the configuration of an SAE at the site that the dictionary writes to."""
    config = dictionary.config
    if config.target:
        # Directions are ablated where the dictionary writes: what it reads is another space for a transcoder.
        changes |= dict(site=config.target, target="", max_norm=config.target_max_norm, target_max_norm=None)
        changes |= dict(d_in=config.d_out, target_width=0)
    plain: dict[str, Any] = dict(k=0, groups=(), skip=False, centred=True, fires_above=0.0, signed=False)
    plain |= dict(input_norm="", output_units=False)
    return dataclasses.replace(config, **plain | changes)
