"""Crosscoders: dictionaries of a joined site, the values of several sites side by side (Lindsey et al., 2024).

    x = [s_1 x_1, ..., s_P x_P]        s_p brings part p to a mean norm of sqrt(D / P), the same for all
    f = sparsity((x - b_dec) W_enc + b_enc),   x_hat = f W_dec + b_dec

so that a feature has one activation and a decoder row for each part. The parts are layers of a model, or a base model
and a tuned one. The *length* of a decoder row is the sum over its parts of their norms, sum_p |d_ip|, and is 1 in
dictionaries trained here. An L1 penalty on f then weighs a feature by that sum, as Lindsey et al. have it, and what
BatchTopK keeps are the largest f_i sum_p |d_ip| (Minder et al., 2025, arXiv 2504.02922). A row's norm as a whole would
make features that all parts share cheaper by the root of P.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.description import DictionaryConfig
from saejax.errors import UserError
from saejax.models.sinks import position_norms
from saejax.models.sites import site_parts


def split(x_xD: Any, widths: Sequence[int]) -> list[Any]:
    """Split joined values into parts, each [..., its width]; values of one site (widths ()) are one part."""
    ends = np.cumsum(widths).tolist() or [x_xD.shape[-1]]
    return [x_xD[..., start:end] for start, end in zip([0, *ends], ends, strict=False)]


def row_lengths(W_dec_FxD: jax.Array, widths: Sequence[int] = ()) -> jax.Array:
    """Return the length of every feature's direction, [F], the sum of its parts' norms; a norm of 0 has gradient 0."""
    return sum((_norms(part_FxD) for part_FxD in split(W_dec_FxD, widths)), jnp.zeros((), W_dec_FxD.dtype))


def _norms(W_dec_FxD: jax.Array) -> jax.Array:
    """Return the norm of every row, with gradient 0 where it is 0."""
    square_F = jnp.sum(jnp.square(W_dec_FxD), axis=-1)
    # The square root's gradient at 0 is infinite, and 0 times that NaN: the inner where keeps 0 out of it.
    return jnp.where(square_F > 0, jnp.sqrt(jnp.where(square_F > 0, square_F, 1.0)), 0.0)


def part_norms(W_dec_FxD: Any, widths: Sequence[int]) -> np.ndarray:
    """Return the norms of the decoder rows' parts, fp64 [P, F]."""
    return np.stack([np.linalg.norm(part, axis=-1) for part in split(np.asarray(W_dec_FxD, np.float64), widths)])


def row_normals(W_dec_FxD: jax.Array, widths: Sequence[int]) -> jax.Array:
    """Return the gradient of ``row_lengths`` in the rows: each part's direction; 0 where it has none."""
    # 0 / 1e-30 is 0: a part that is zero gets no direction, and no NaN.
    parts = [part_FxD / jnp.maximum(_norms(part_FxD), 1e-30)[:, None] for part_FxD in split(W_dec_FxD, widths)]
    return jnp.concatenate(parts, axis=-1)


def join(config: DictionaryConfig, values: Mapping[str, Any]) -> jax.Array:
    """Return what a crosscoder reads, [..., D], from the values [..., width] at its parts, by name.

    Raises:
      UserError: a part is missing or of another width.
    """
    names = site_parts(config.site)
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"a crosscoder of {config.site} needs the values at {', '.join(missing)}: capture them too")
    for name, width in zip(names, config.widths, strict=True):
        if values[name].shape[-1] != width:
            raise UserError(
                f"the values at {name} have the width {values[name].shape[-1]}, but the crosscoder's part is {width} "
                "wide: take one made for these models"
            )
    scaled = [jnp.asarray(values[name], jnp.float32) * scale for name, scale in zip(names, config.scales, strict=True)]
    return jnp.concatenate(scaled, axis=-1)


def unjoin(config: DictionaryConfig, x_xD: Any) -> dict[str, Any]:
    """Return the values at the parts, by name, of joined values [..., D]; the inverse of ``join``."""
    parts = zip(site_parts(config.site), split(x_xD, config.widths), config.scales, strict=True)
    return {name: part_xD / scale for name, part_xD, scale in parts}


def is_not_sink(config: DictionaryConfig, x_xD: jax.Array) -> jax.Array:
    """Return True where no part of joined values is an attention sink; the shape of ``x`` without its last axis."""
    config.require_sink_norms()
    # The rule is about a part's own values, before they were scaled.
    limits = [max_norm * scale for max_norm, scale in zip(config.max_norms, config.scales, strict=True)]
    norms = map(position_norms, split(x_xD, config.widths))
    return jnp.stack([norm_x <= limit for norm_x, limit in zip(norms, limits, strict=True)]).all(0)
