"""A sparse dictionary as a Flax module: encoder, sparsity function, decoder.

    f = sparsity((x - b_dec) W_enc + b_enc)        features, F of them, mostly 0
    y_hat = f W_dec + b_dec                        reconstruction of x, or a transcoder's prediction of another site

Rows of ``W_dec`` are the features' directions. Those of dictionaries trained here have unit norm, so ``f_i`` is the
length of what feature i adds; a dictionary loaded from another tool's file keeps the lengths that it has. Positions
whose norm exceeds ``max_norm`` are attention sinks: the dictionary was not trained on them, is not scored on them, and
its edits leave them as they are.

Which features are active is the matter of its kind, of ``dictionaries.kinds``.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from saejax.dictionaries import joined, kinds
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.editing import Editing
from saejax.dictionaries.input_norm import normalise
from saejax.dictionaries.matmul import centred_matmul, matmul
from saejax.dictionaries.sparsity import row


def parameter_table(config: DictionaryConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Every array of a dictionary: its shape, and the mesh axis over which each dimension is split."""
    d, f = config.d_in, config.n_features
    by_feature: tuple[tuple[int, ...], tuple[str | None, ...]] = ((f,), ("model",))
    table: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "W_enc_DxF": ((d, f), (None, "model")),
        "b_enc_F": by_feature,
        "W_dec_FxD": ((f, d), ("model", None)),
        "b_dec_D": ((d,), (None,)),
    }
    table |= {name: by_feature for name in kinds.by_name(config.kind).vectors}
    if config.skip:
        table["W_skip_DxD"] = ((d, d), (None, None))
    return table


class Dictionary(Editing, nnx.Module):
    """A sparse autoencoder of one site, or a transcoder from one site to another; a pytree of its arrays.

    ``config`` and ``matmul_dtype`` are static, part of the tree's structure: programs take dictionaries as arguments,
    and dictionaries that differ only in their arrays share a compiled program.

    Edits of its features during a forward pass are made by the methods of ``Editing``: ``lm(tokens,
    edits=[sae.ablate([101, 2048])])``.

    Args:
      matmul_dtype: dtype of the operands of matrix products (sums are in the arrays' dtype).
      arrays: those of ``parameter_table``.
    """

    def __init__(self, config: DictionaryConfig, matmul_dtype: str = "float32", **arrays: jax.Array):
        self.config = nnx.static(config)
        self.matmul_dtype = nnx.static(matmul_dtype)
        for name, (shape, _) in parameter_table(config).items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {shape}")
            setattr(self, name, nnx.Param(arrays[name]))

    @classmethod
    def initial(
        cls, config: DictionaryConfig, key: jax.Array, matmul_dtype: str = "float32", dtype: str = "float32"
    ) -> "Dictionary":
        """A dictionary of unit directions drawn by ``key``; the encoder is the decoder's transpose, all else is 0."""
        directions_FxD = jax.random.normal(key, (config.n_features, config.d_in), dtype)
        directions_FxD /= jnp.linalg.norm(directions_FxD, axis=-1, keepdims=True)
        arrays = {name: jnp.zeros(shape, dtype) for name, (shape, _) in parameter_table(config).items()}
        first = dict(W_enc_DxF=directions_FxD.T, W_dec_FxD=directions_FxD)
        if config.widths:
            # Rows of norm 1 / length: so the encoder is as much longer, and decode(encode(row)) gives the row again.
            length_Fx1 = joined.row_lengths(directions_FxD, config.widths)[:, None]
            first = dict(W_enc_DxF=(directions_FxD * length_Fx1).T, W_dec_FxD=directions_FxD / length_Fx1)
        return cls(config, matmul_dtype, **arrays | first)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Its arrays by name."""
        return {name: getattr(self, name)[...] for name in parameter_table(self.config)}

    def pre_activations(self, x_xD: jax.Array) -> jax.Array:
        """What the encoder gives before its bias, ``[..., F]``."""
        x_xD = x_xD.astype(self.b_dec_D.dtype)
        if self.config.input_norm:
            x_xD = normalise(x_xD, self.config.input_norm).x_xD
        if self.config.centred:
            return centred_matmul(x_xD, self.b_dec_D[...], self._matrix(self.W_enc_DxF), self.matmul_dtype)
        return matmul(x_xD, self._matrix(self.W_enc_DxF), self.matmul_dtype)

    def _matrix(self, parameter: nnx.Param) -> jax.Array:
        """A matrix in the dtype of the biases: those of inference may be in bfloat16, and products are not."""
        return parameter[...].astype(self.b_dec_D.dtype)

    @property
    def kind(self) -> kinds.Kind:
        """What decides which of its features are active."""
        return kinds.by_name(self.config.kind)

    @property
    def numbers(self) -> dict[str, float]:
        """What its kind reads of ``config`` as numbers."""
        return {name: getattr(self.config, name) for name in self.kind.numbers}

    def encode(self, x_xD: jax.Array, numbers: Mapping[str, Any] | None = None) -> jax.Array:
        """Feature activations ``f_xF`` of ``x_xD`` (any leading dimensions); 0 or above unless its kind is signed.

        Args:
          x_xD: values of the site.
          numbers: in place of those of ``config``, such as traced ones.
        """
        projected_xF = self.pre_activations(x_xD)
        pre_xF = projected_xF + row(self.b_enc_F[...], x_xD.ndim)
        f_xF = self.kind.encode(self, pre_xF, projected_xF, self.numbers if numbers is None else numbers)
        if self.config.output_units:
            f_xF = f_xF * normalise(x_xD.astype(f_xF.dtype), self.config.input_norm).scale_x1
        return f_xF

    def decode(self, f_xF: jax.Array, x_xD: jax.Array | None = None) -> jax.Array:
        """The reconstruction, or the prediction of the target, from feature activations.

        Args:
          f_xF: feature activations.
          x_xD: the input, which a skip transcoder needs, and a dictionary that normalises each token.
        """
        written_xD = matmul(f_xF, self._matrix(self.W_dec_FxD), self.matmul_dtype)
        if not self.config.input_norm:
            return self._with_bias(written_xD, x_xD)
        if x_xD is None:
            raise ValueError("a dictionary that normalises each token decodes with its input: give x_xD")
        normalised = normalise(x_xD.astype(written_xD.dtype), self.config.input_norm)
        if self.config.output_units:  # features have the scale already
            bias_xD = self._with_bias(jnp.zeros_like(written_xD), normalised.x_xD)
            return written_xD + bias_xD * normalised.scale_x1 + normalised.shift_x1
        return self._with_bias(written_xD, normalised.x_xD) * normalised.scale_x1 + normalised.shift_x1

    def output_scale(self, x_xD: jax.Array) -> jax.Array | None:
        """What decoder rows are multiplied with at each token, [..., 1]; None for 1 at all of them."""
        if self.config.input_norm in ("", "center") or self.config.output_units:
            return None
        return normalise(x_xD.astype(self.b_dec_D.dtype), self.config.input_norm).scale_x1

    def without_bias(self, y_xD: jax.Array, x_xD: jax.Array | None = None) -> jax.Array:
        """What is left of targets for features to explain: y less what ``decode`` adds whatever they are."""
        return y_xD - self._with_bias(jnp.zeros_like(y_xD), x_xD)

    def _with_bias(self, y_xD: jax.Array, x_xD: jax.Array | None) -> jax.Array:
        """What features add, and what is added whatever they are."""
        y_xD = y_xD + row(self.b_dec_D[...], y_xD.ndim)
        if not self.config.skip:
            return y_xD
        if x_xD is None:
            raise ValueError("a skip transcoder decodes with its input: give x_xD")
        return y_xD + matmul(x_xD.astype(y_xD.dtype), self._matrix(self.W_skip_DxD), self.matmul_dtype)

    def __call__(self, x_xD: jax.Array) -> jax.Array:
        """Encodes and decodes."""
        return self.decode(self.encode(x_xD), x_xD)

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Where features fire: above 0 in most kinds."""
        return self.kind.fires(f_xF, self.numbers)

    def is_not_sink(self, x_xD: jax.Array) -> jax.Array:
        """True where ``x`` is not an attention sink; the shape of ``x`` without its last axis."""
        if self.config.widths:
            return joined.is_not_sink(self.config, x_xD)
        return jnp.linalg.norm(x_xD.astype(jnp.float32), axis=-1) <= self.config.max_norm
