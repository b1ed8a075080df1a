"""A sparse dictionary as a Flax module: encoder, sparsity function, decoder.

    f = sparsity((x - b_dec) W_enc + b_enc)        features, F of them, mostly 0
    y_hat = f W_dec + b_dec                        reconstruction of x, or a transcoder's prediction of another site

Rows of ``W_dec`` are the features' directions. Those of dictionaries trained here have unit norm, so ``f_i`` is the
length of what feature i adds; a dictionary loaded from another tool's file keeps the lengths that it has. Positions
whose norm exceeds ``max_norm`` are attention sinks: the dictionary was not trained on them, is not scored on them, and
its edits leave them as they are.

The kinds differ in ``sparsity``: ``standard`` max(pre, 0); ``linear`` pre itself; ``gated`` a gate and a magnitude
(Rajamanoharan et al., 2024); ``jumprelu`` pre where it exceeds a learnt threshold; ``topk`` the k largest;
``batchtopk`` and ``matryoshka`` are trained with the B k largest of a batch and read with a threshold.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from saejax.dictionaries import sparsity
from saejax.dictionaries.description import DictionaryConfig, parameter_table
from saejax.dictionaries.editing import Editing
from saejax.dictionaries.matmul import centred_matmul, matmul
from saejax.dictionaries.sparsity import row


class Dictionary(Editing, nnx.Module):
    """A sparse autoencoder of one site, or a transcoder from one site to another; a pytree of its arrays.

    What is static of it, ``config`` and ``operands``, is part of its tree's structure: programs take dictionaries as
    they are, and those that differ in their arrays alone share what is compiled.

    Edits of its features during a forward pass are made by the methods of ``Editing``: ``lm(tokens,
    edits=[sae.ablate([101, 2048])])``.

    Args:
      config: what it is.
      operands: dtype of the operands of matrix products (sums are in the arrays' dtype).
      arrays: those of ``parameter_table``.
    """

    def __init__(self, config: DictionaryConfig, operands: str = "float32", **arrays: jax.Array):
        self.config = nnx.static(config)
        self.operands = nnx.static(operands)
        for name, (shape, _) in parameter_table(config).items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {shape}")
            setattr(self, name, nnx.Param(arrays[name]))

    @classmethod
    def initial(
        cls, config: DictionaryConfig, key: jax.Array, operands: str = "float32", dtype: str = "float32"
    ) -> "Dictionary":
        """A dictionary of random unit directions; the encoder is the decoder's transpose, all else is 0."""
        directions_FxD = jax.random.normal(key, (config.n_features, config.d_in), dtype)
        directions_FxD /= jnp.linalg.norm(directions_FxD, axis=-1, keepdims=True)
        arrays = {name: jnp.zeros(shape, dtype) for name, (shape, _) in parameter_table(config).items()}
        return cls(config, operands, **arrays | dict(W_enc_DxF=directions_FxD.T, W_dec_FxD=directions_FxD))

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Its arrays by name."""
        return {name: getattr(self, name)[...] for name in parameter_table(self.config)}

    def pre_activations(self, x_BxD: jax.Array) -> jax.Array:
        """What the encoder gives before its bias, ``[..., F]``."""
        x_BxD = x_BxD.astype(self.b_dec_D.dtype)
        if self.config.centred:
            return centred_matmul(x_BxD, self.b_dec_D[...], self.W_enc_DxF[...], self.operands)
        return matmul(x_BxD, self.W_enc_DxF[...], self.operands)

    def encode(self, x_BxD: jax.Array) -> jax.Array:
        """Feature activations ``f_BxF`` of ``x_BxD`` (any leading dimensions); 0 or above unless the kind is linear."""
        config = self.config
        projected_BxF = self.pre_activations(x_BxD)
        pre_BxF = projected_BxF + row(self.b_enc_F[...], x_BxD.ndim)
        if config.kind == "topk":
            return sparsity.topk(pre_BxF, config.k)
        if config.has_threshold:
            return sparsity.threshold(pre_BxF, self.threshold_F[...])
        if config.kind == "gated":
            return sparsity.gated(pre_BxF, self.magnitudes(projected_BxF))
        return pre_BxF if config.kind == "linear" else sparsity.relu(pre_BxF)

    def magnitudes(self, projected_BxF: jax.Array) -> jax.Array:
        """Pre-activations of a gated dictionary's magnitude path, which shares the encoder's directions."""
        scale_F, bias_F = jnp.exp(self.r_mag_F[...]), self.b_mag_F[...]
        return projected_BxF * row(scale_F, projected_BxF.ndim) + row(bias_F, projected_BxF.ndim)

    def decode(self, f_BxF: jax.Array, x_BxD: jax.Array | None = None) -> jax.Array:
        """The reconstruction, or the prediction of the target, from feature activations.

        Args:
          f_BxF: feature activations.
          x_BxD: the input, which a skip transcoder needs.
        """
        y_BxD = matmul(f_BxF, self.W_dec_FxD[...], self.operands) + row(self.b_dec_D[...], f_BxF.ndim)
        if not self.config.skip:
            return y_BxD
        if x_BxD is None:
            raise ValueError("a skip transcoder decodes with its input: give x_BxD")
        return y_BxD + matmul(x_BxD.astype(y_BxD.dtype), self.W_skip_DxD[...], self.operands)

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """Encodes and decodes."""
        return self.decode(self.encode(x_BxD), x_BxD)

    def fires(self, f_BxF: jax.Array) -> jax.Array:
        """Where features fire: above 0; for linear dictionaries, |f| above ``fires_above``."""
        return jnp.abs(f_BxF) > self.config.fires_above if self.config.kind == "linear" else f_BxF > 0

    def in_domain(self, x_BxD: jax.Array) -> jax.Array:
        """True where ``x`` is not an attention sink; the shape of ``x`` without its last axis."""
        return jnp.linalg.norm(x_BxD.astype(jnp.float32), axis=-1) <= self.config.max_norm
