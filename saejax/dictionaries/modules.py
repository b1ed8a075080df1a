"""A sparse dictionary as a Flax module: encoder, sparsity function, decoder.

    f = sparsity((x - b_dec) W_enc + b_enc)        features, F of them, mostly 0
    x_hat = f W_dec + b_dec                        reconstruction

Rows of ``W_dec`` are the features' directions and have unit norm, so ``f_i`` is the length of what
feature i adds. Positions whose norm exceeds ``max_norm`` are attention sinks: the dictionary was not
trained on them, is not scored on them, and its edits leave them as they are.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.config import Config, setting
from saejax.dictionaries import sparsity
from saejax.dictionaries.edits import POSITIONS, FeatureEdit
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError, one_of
from saejax.models.sites import Site
from saejax.settings import KINDS


@dataclasses.dataclass(frozen=True)
class DictionaryConfig(Config):
    """What a dictionary is, apart from its arrays.

    Attributes:
      kind: "topk" or "standard" (ReLU, trained with L1).
      site: the site it reads and rebuilds, such as "resid_post.15".
      d_in: width of the site.
      n_features: number of features F.
      k: active features per token (topk; else 0).
      max_norm: norm of ``x`` above which a position is an attention sink.
      model, revision, fingerprint: the language model whose activations it was trained on.
    """

    kind: str = setting("topk", "kind", choices=KINDS)
    site: str = setting("", "site")
    d_in: int = setting(1, "input width", low=1)
    n_features: int = setting(1, "features", low=1)
    k: int = setting(0, "active features per token", low=0)
    max_norm: float = setting(3.4e38, "largest norm of a position that is not a sink", low=0.0)
    model: str = setting("", "language model")
    revision: str = setting("", "its revision")
    fingerprint: str = setting("", "its fingerprint")


class Dictionary(nnx.Module):
    """A sparse autoencoder of one site.

    Args:
      config: what it is.
      W_enc_DxF, b_enc_F, W_dec_FxD, b_dec_D: its arrays.
      operands: dtype of the operands of matrix products (sums are in the arrays' dtype).
    """

    def __init__(
        self,
        config: DictionaryConfig,
        W_enc_DxF: jax.Array,
        b_enc_F: jax.Array,
        W_dec_FxD: jax.Array,
        b_dec_D: jax.Array,
        operands: str = "float32",
    ):
        self.config = nnx.static(config)
        self.operands = nnx.static(operands)
        self.W_enc_DxF = nnx.Param(W_enc_DxF)
        self.b_enc_F = nnx.Param(b_enc_F)
        self.W_dec_FxD = nnx.Param(W_dec_FxD)
        self.b_dec_D = nnx.Param(b_dec_D)

    @classmethod
    def initial(
        cls, config: DictionaryConfig, key: jax.Array, operands: str = "float32", dtype: str = "float32"
    ) -> "Dictionary":
        """A dictionary of random unit directions; the encoder is the decoder's transpose, biases are 0."""
        directions_FxD = jax.random.normal(key, (config.n_features, config.d_in), dtype)
        directions_FxD /= jnp.linalg.norm(directions_FxD, axis=-1, keepdims=True)
        b_enc_F, b_dec_D = jnp.zeros(config.n_features, dtype), jnp.zeros(config.d_in, dtype)
        return cls(config, directions_FxD.T, b_enc_F, directions_FxD, b_dec_D, operands)

    @property
    def site(self) -> str:
        """The site it reads and rebuilds."""
        return self.config.site

    def encode(self, x_BxD: jax.Array) -> jax.Array:
        """Feature activations ``f_BxF >= 0`` of ``x_BxD`` (any leading dimensions)."""
        centred_BxD = x_BxD.astype(self.b_dec_D.dtype) - _row(self.b_dec_D[...], x_BxD.ndim)
        pre_BxF = matmul(centred_BxD, self.W_enc_DxF[...], self.operands)
        pre_BxF += _row(self.b_enc_F[...], x_BxD.ndim)
        if self.config.kind == "topk":
            return sparsity.topk(pre_BxF, self.config.k)
        return sparsity.relu(pre_BxF)

    def decode(self, f_BxF: jax.Array) -> jax.Array:
        """The reconstruction ``x_BxD`` from feature activations."""
        return matmul(f_BxF, self.W_dec_FxD[...], self.operands) + _row(self.b_dec_D[...], f_BxF.ndim)

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """Encodes and decodes."""
        return self.decode(self.encode(x_BxD))

    def in_domain(self, x_BxD: jax.Array) -> jax.Array:
        """True where ``x`` is not an attention sink; the shape of ``x`` without its last axis."""
        return jnp.linalg.norm(x_BxD.astype(jnp.float32), axis=-1) <= self.config.max_norm

    def ablate(self, features: Sequence[int], positions: str = "all") -> FeatureEdit:
        """The edit that sets these features to zero and keeps everything else, the error term included.

        Args:
          features: feature indices, 0 <= i < n_features.
          positions: "all", or "last" (each prompt's last token).

        Raises:
          UserError: a feature does not exist, or the positions are unknown.
        """
        one_of(positions, POSITIONS, "positions")
        wrong = [i for i in features if not 0 <= i < self.config.n_features]
        if wrong:
            raise UserError(f"features {wrong[:5]} do not exist: there are 0 to {self.config.n_features - 1}")
        graph, state = nnx.split(self)
        chosen_K = jnp.asarray(np.asarray(features, np.int32))
        return FeatureEdit(state, chosen_K, jnp.float32(0.0), Site.parse(self.site), graph, positions)


def _row(vector_N: jax.Array, ndim: int) -> jax.Array:
    """A vector as an array of ``ndim`` dimensions, so that adding it promotes no rank silently."""
    return vector_N.reshape((1,) * (ndim - 1) + vector_N.shape)
