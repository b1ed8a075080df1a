"""A member's trained arrays as a dictionary for raw activations."""

import dataclasses

import jax
import jax.numpy as jnp

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.settings import TrainConfig
from saejax.training.members import Member, SiteScale
from saejax.training.objective import Arrays


def finished(
    config: TrainConfig, dictionary: DictionaryConfig, member: Member, scale: SiteScale, arrays: Arrays, kept: jax.Array
) -> Dictionary:
    """A member's trained dictionary, for raw activations.

    Every kind is homogeneous, so the scales leave by dividing biases and thresholds by them; where decoder
    rows have grown freely their lengths move to the encoder.

    Args:
      config: how it was trained.
      dictionary: what the members have in common.
      member, scale: which one it is, and the scales of its site.
      arrays: as trained, for scaled activations.
      kept: what ``threshold_F`` becomes of kinds that chose among a batch in training.
    """
    arrays = dict(arrays)
    if dictionary.has_threshold and dictionary.kind != "jumprelu":
        arrays["threshold_F"] = jnp.full_like(arrays["threshold_F"], kept)
    arrays = unit_decoder(arrays)
    ratio = scale.input / scale.output
    for name in arrays:
        if name in ("W_enc_DxF", "W_skip_DxD"):
            arrays[name] = arrays[name] * ratio
        elif name not in ("W_dec_FxD", "r_mag_F"):
            arrays[name] = arrays[name] / scale.output
    described = dataclasses.replace(
        dictionary,
        site=member.site,
        target="" if member.target == member.site else member.target,
        k=member.k if dictionary.k else 0,
        fires_above=dictionary.fires_above / scale.output,
        max_norm=scale.max_norm,
    )
    return Dictionary(described, config.matmul, **arrays)


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
