"""TopK codes on a CPU without the products of features that are not active.

Of a token's F features k are active, so decoding and every product of its gradient take k / F of the dense form's
multiplications. ``jax.experimental.sparse`` multiplies matrices in compressed rows by a kernel of jaxlib; gathers and
scatters by XLA are as slow as the dense products. Processor time in ms of 1,024 tokens, F 4,608, width 576 and k 32,
dense in fp32, dense in bfloat16 and sparse: decoding 52, 21, 4; the gradient of activations 49, 13, 9; that of a weight
matrix 48, 55, 8. The encoder's product stays.
The dense form (``sparsity.topk``, ``matmul``) is what these functions are tested against, and what all else uses.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.sparse import BCSR
from jax.sharding import Mesh

from saejax.dictionaries import sparsity
from saejax.dictionaries.matmul import matmul

_WINS_FROM = dict(float32=24, bfloat16=64)  # features per active one, by the operands of dense products
_PACKED = 2**32  # numbers that 32 bits hold
_GATHERED = 16  # tokens whose decoder rows are gathered at once: they fit into a core's cache


def wins(mesh: Mesh, operands: str, n_features: int, k: int) -> bool:
    """Whether a training step is faster with the sparse form, as measured.

    Args:
      mesh: the devices; the kernel is for a single CPU device.
      operands: of the dense products; see ``matmul``.
      n_features, k: F, and how many are active at most.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return on_cpu and mesh.size == 1 and n_features >= _WINS_FROM[operands] * k


class ByFeature(NamedTuple):
    """The entries of a code in the order of their features: N = B k of them.

    Attributes:
      order_N: their places in the code, in order of its tokens.
      starts_X: where each feature's begin, and the end of the last; F + 1 numbers.
    """

    order_N: jax.Array
    starts_X: jax.Array

    @classmethod
    def of(cls, feature_BxK: jax.Array, n_features: int) -> "ByFeature":
        """Of the features of each token, [B, K], out of ``n_features``."""
        feature_N = feature_BxK.reshape(-1)
        count = len(feature_N)
        if count * n_features < _PACKED:  # one number for both: XLA:CPU sorts single ones four times as fast
            place_N = jnp.arange(count, dtype=jnp.uint32)
            sorted_N = lax.sort(feature_N.astype(jnp.uint32) * jnp.uint32(count) + place_N, is_stable=False)
            order_N = sorted_N % jnp.uint32(count)
        else:
            order_N = jnp.argsort(feature_N)
        every_X = jnp.arange(n_features + 1, dtype=feature_N.dtype)
        starts_X = jnp.searchsorted(feature_N[order_N], every_X)
        return cls(order_N.astype(jnp.int32), starts_X.astype(jnp.int32))

    def product(self, value_BxK: jax.Array, x_BxD: jax.Array) -> jax.Array:
        """f.T @ x, [F, D], of the code f that has ``value_BxK`` in place of its values."""
        token_N, value_N = self.order_N // value_BxK.shape[1], value_BxK.reshape(-1)[self.order_N]
        shape = len(self.starts_X) - 1, len(x_BxD)
        return BCSR((value_N, token_N, self.starts_X), shape=shape) @ x_BxD


class SparseCode(NamedTuple):
    """The active features of B tokens, at most k of each.

    Attributes:
      value_BxK: their activations, largest first; 0 where there are no more.
      feature_BxK: which features they are, int32; none twice in a row.
      by_feature: the same by feature.
    """

    value_BxK: jax.Array
    feature_BxK: jax.Array
    by_feature: ByFeature

    def dense(self) -> jax.Array:
        """Activations of all features, [B, F]."""
        count, features = len(self.value_BxK), len(self.by_feature.starts_X) - 1
        row_Bx1 = jnp.arange(count, dtype=jnp.int32)[:, None]
        zeros_BxF = jnp.zeros((count, features), self.value_BxK.dtype)
        return zeros_BxF.at[row_Bx1, self.feature_BxK].set(self.value_BxK, unique_indices=True)

    def sums(self, value_BxK: jax.Array) -> jax.Array:
        """The sum of each feature's values, [F]."""
        zeros_F = jnp.zeros(len(self.by_feature.starts_X) - 1, value_BxK.dtype)
        return zeros_F.at[self.feature_BxK.reshape(-1)].add(value_BxK.reshape(-1))

    def firings(self) -> jax.Array:
        """On how many tokens each feature is active, fp32 [F]."""
        return self.sums((self.value_BxK > 0).astype(jnp.float32))


def encode(
    x_BxD: jax.Array,
    centre_D: jax.Array,
    W_enc_DxF: jax.Array,
    b_enc_F: jax.Array,
    k: int | jax.Array,
    most: int,
    operands: str = "float32",
    dense_gradient: bool | jax.Array = True,
) -> tuple[SparseCode, jax.Array]:
    """The code of ``sparsity.topk((x - centre) @ W_enc + b_enc, k)``, and the pre-activations [B, F].

    Args:
      x_BxD, centre_D: inputs and what is subtracted from each.
      W_enc_DxF, b_enc_F: the encoder.
      k: 1 <= k <= ``most``; may be traced. Of values that tie with the k-th largest, the first ones are kept.
      most: the largest k there can be, at most F.
      operands: of the encoder's product; see ``matmul``. The sparse products of its gradient are in the arrays' dtype.
      dense_gradient: False if nothing but the code depends on what this returns: then that of the pre-activations is
        taken for 0.
    """
    flags = jnp.asarray(k), jnp.asarray(dense_gradient)
    return _encode(x_BxD, centre_D, W_enc_DxF, b_enc_F, flags, most, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _encode(x_BxD, centre_D, W_enc_DxF, b_enc_F, flags, most, operands):
    pre_BxF = matmul(x_BxD - centre_D[None], W_enc_DxF, operands) + b_enc_F[None]
    value_BxK, feature_BxK = sparsity.largest(pre_BxF, most)
    active_BxK = (jnp.arange(most)[None] < flags[0]) & (value_BxK > 0)
    by_feature = ByFeature.of(feature_BxK, pre_BxF.shape[1])
    return SparseCode(jnp.where(active_BxK, value_BxK, 0.0), feature_BxK, by_feature), pre_BxF


def _forward_encode(x_BxD, centre_D, W_enc_DxF, b_enc_F, flags, most, operands):
    code, pre_BxF = _encode(x_BxD, centre_D, W_enc_DxF, b_enc_F, flags, most, operands)
    return (code, pre_BxF), (x_BxD - centre_D[None], W_enc_DxF, code, flags[1])


def _backward_encode(most, operands, saved, cotangents):
    x_BxD, W_enc_DxF, code, dense_gradient = saved
    to_code, to_pre_BxF = cotangents
    to_value_BxK = jnp.where(code.value_BxK > 0, to_code.value_BxK, 0.0)

    def sparse() -> tuple[jax.Array, ...]:
        to_x_BxD = product(code._replace(value_BxK=to_value_BxK), W_enc_DxF.T)
        return to_x_BxD, code.by_feature.product(to_value_BxK, x_BxD).T, code.sums(to_value_BxK)

    def both() -> tuple[jax.Array, ...]:
        pulled = jax.vjp(lambda x, W: matmul(x, W, operands), x_BxD, W_enc_DxF)[1](to_pre_BxF)
        return jax.tree.map(jnp.add, sparse(), (*pulled, to_pre_BxF.sum(axis=0)))

    to_x_BxD, to_W_DxF, to_b_F = lax.cond(dense_gradient, both, sparse)
    return to_x_BxD, -(matmul(W_enc_DxF, to_b_F[:, None])[:, 0]), to_W_DxF, to_b_F, None


_encode.defvjp(_forward_encode, _backward_encode)


@jax.custom_vjp
def product(code: SparseCode, W_FxD: jax.Array) -> jax.Array:
    """f @ W, [B, D], of the activations f of a code."""
    count, most = code.value_BxK.shape
    starts_X = jnp.arange(0, count * most + 1, most, dtype=jnp.int32)
    arrays = code.value_BxK.reshape(-1), code.feature_BxK.reshape(-1), starts_X
    return BCSR(arrays, shape=(count, len(W_FxD))) @ W_FxD


def _forward_product(code, W_FxD):
    return product(code, W_FxD), (code, W_FxD)


def _backward_product(saved, to_y_BxD):
    code, W_FxD = saved
    pairs = code.feature_BxK, to_y_BxD
    to_value_BxK = lax.map(lambda pair: W_FxD[pair[0]] @ pair[1], pairs, batch_size=_GATHERED)
    return SparseCode(to_value_BxK, None, ByFeature(None, None)), code.by_feature.product(code.value_BxK, to_y_BxD)


product.defvjp(_forward_product, _backward_product)
