"""TopK codes without the products of features that are not active.

Of a token's F features k are active, so decoding and every product of its gradient take k / F of the dense form's
multiplications. The encoder's product stays. There are two forms:

- ``rows``, for one CPU device: ``jax.experimental.sparse`` multiplies matrices in compressed rows by a kernel of
  jaxlib; gathers and scatters by XLA are as slow as the dense products. Processor time in ms of 1,024 tokens, F 4,608,
  width 576 and k 32, dense in fp32, dense in bfloat16 and sparse: decoding 52, 21, 4; the gradient of activations 49,
  13, 9; that of a weight matrix 48, 55, 8.
- ``kernels``, for one GPU: those of ``sparse_kernels``. Nobody has timed them yet, so nobody gets them unasked.

The dense form (``sparsity.topk``, ``matmul``) is what these are tested against, and what all else uses.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.sparse import BCSR
from jax.sharding import Mesh

from saejax.dictionaries import selection, sparse_kernels
from saejax.dictionaries.codes import ByFeature, SparseCode
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError

_WINS_FROM = dict(float32=24, bfloat16=64)  # features per active one, by the operands of dense products
_GATHERED = 16  # tokens whose decoder rows are gathered at once: they fit into a core's cache


def chosen_form(asked: str, mesh: Mesh, matmul_dtype: str, n_features: int, k: int) -> str:
    """The form of a training step's products: "dense", "rows" or "kernels".

    Args:
      asked: one of them, or "auto": "rows" where a step was measured to be faster with them, else "dense".
      matmul_dtype: of the dense products; see ``matmul``.
      n_features, k: F, and how many are active at most.

    Raises:
      UserError: what is asked for is not for these devices.
    """
    platform = mesh.devices.flat[0].platform
    if asked == "auto":
        wins = platform == "cpu" and mesh.size == 1 and n_features >= _WINS_FROM[matmul_dtype] * k
        return "rows" if wins else "dense"
    if asked != "dense" and (mesh.size > 1 or platform not in dict(rows=("cpu",), kernels=("cpu", "gpu"))[asked]):
        only = dict(rows="one CPU device", kernels="one GPU (or, to check them slowly, one CPU device)")[asked]
        have = f"{mesh.size} of platform {platform}"
        raise UserError(f"--train.products={asked} is for {only}, and there are {have}: use dense or auto")
    return asked


class Encoder(NamedTuple):
    """What makes codes of inputs: ``sparsity.topk((x - centre) @ W_enc + b_enc, k)``."""

    centre_D: jax.Array
    W_enc_DxF: jax.Array
    b_enc_F: jax.Array


class Explained(NamedTuple):
    """A batch, as far as a dictionary explains it.

    Attributes:
      code: the active features.
      pre_BxF: pre-activations of all.
      error_BxD: what is left of the targets.
    """

    code: SparseCode
    pre_BxF: jax.Array
    error_BxD: jax.Array


class Products(NamedTuple):
    """What is static of ``explain``.

    Attributes:
      most: the largest k there can be, at most F.
      matmul_dtype: of the encoder's product; see ``matmul``. With the form "kernels" that of all products, with "rows"
        the others are in the arrays' dtype.
      form: "rows" or "kernels".
    """

    most: int
    matmul_dtype: str = "float32"
    form: str = "rows"


def explain(
    x_BxD: jax.Array,
    y_BxD: jax.Array,
    encoder: Encoder,
    W_dec_FxD: jax.Array,
    k: int | jax.Array,
    how: Products,
    dense_gradient: bool | jax.Array = True,
) -> Explained:
    """The codes f of x, and the errors y - f @ W_dec.

    Args:
      x_BxD, y_BxD: inputs, and targets without what is added to f @ W_dec.
      encoder, W_dec_FxD: the dictionary.
      k: 1 <= k <= ``how.most``; may be traced. Of values that tie with the k-th largest, the first ones are kept.
      how: what is static of it.
      dense_gradient: False if nothing but the code and the error depends on what this returns: then the gradient of the
        pre-activations is taken for 0.
    """
    flags = jnp.asarray(k), jnp.asarray(dense_gradient)
    return _explain(x_BxD, y_BxD, encoder, W_dec_FxD, flags, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _explain(x_BxD, y_BxD, encoder, W_dec_FxD, flags, how):
    centred_BxD = x_BxD - encoder.centre_D[None]
    pre_BxF = matmul(centred_BxD, encoder.W_enc_DxF, how.matmul_dtype) + encoder.b_enc_F[None]
    value_BxK, feature_BxK = selection.largest(pre_BxF, flags[0], how.most)
    code = SparseCode(value_BxK, feature_BxK, ByFeature.of(feature_BxK, pre_BxF.shape[1]))
    return Explained(code, pre_BxF, remainder(code, W_dec_FxD, y_BxD, how))


def _forward(x_BxD, y_BxD, encoder, W_dec_FxD, flags, how):
    found = _explain(x_BxD, y_BxD, encoder, W_dec_FxD, flags, how)
    return found, (x_BxD - encoder.centre_D[None], encoder.W_enc_DxF, W_dec_FxD, found.code, flags[1])


def _backward(how, saved, to):
    x_BxD, W_enc_DxF, W_dec_FxD, code, dense_gradient = saved
    to_value_BxK = to.code.value_BxK - row_products(code.feature_BxK, W_dec_FxD, to.error_BxD, how)
    to_value_BxK = jnp.where(code.value_BxK > 0, to_value_BxK, 0.0)
    pairs = (to_value_BxK, x_BxD), (-code.value_BxK, to.error_BxD)
    to_W_enc_FxD, to_W_dec_FxD = feature_sums(code.by_feature, pairs, how)

    def sparse() -> tuple[jax.Array, ...]:
        moved = code._replace(value_BxK=-to_value_BxK)
        return remainder(moved, W_enc_DxF.T, jnp.zeros_like(x_BxD), how), to_W_enc_FxD.T, code.sums(to_value_BxK)

    def both() -> tuple[jax.Array, ...]:
        pulled = jax.vjp(lambda x, W: matmul(x, W, how.matmul_dtype), x_BxD, W_enc_DxF)[1](to.pre_BxF)
        return jax.tree.map(jnp.add, sparse(), (*pulled, to.pre_BxF.sum(axis=0)))

    to_x_BxD, to_W_DxF, to_b_F = lax.cond(dense_gradient, both, sparse)
    to_centre_D = -(matmul(W_enc_DxF, to_b_F[:, None])[:, 0])
    return to_x_BxD, to.error_BxD, Encoder(to_centre_D, to_W_DxF, to_b_F), to_W_dec_FxD, None


_explain.defvjp(_forward, _backward)


def remainder(code: SparseCode, W_FxD: jax.Array, y_BxD: jax.Array, how: Products) -> jax.Array:
    """y - f @ W of the activations f of a code."""
    count, most = code.value_BxK.shape
    starts_X, feature_N = jnp.arange(0, count * most + 1, most, dtype=jnp.int32), code.feature_BxK.reshape(-1)
    if how.form == "rows":
        return y_BxD - BCSR((code.value_BxK.reshape(-1), feature_N, starts_X), shape=(count, len(W_FxD))) @ W_FxD
    term = -code.value_BxK.reshape(-1), _rounded(W_FxD, how)
    return sparse_kernels.segment_sums(starts_X, feature_N, [term], y_BxD)[0]


def row_products(feature_BxK: jax.Array, W_FxD: jax.Array, y_BxD: jax.Array, how: Products) -> jax.Array:
    """The entries of y @ W.T at each token's features, ``feature_BxK``; [B, K]."""
    if how.form == "rows":
        return lax.map(lambda pair: W_FxD[pair[0]] @ pair[1], (feature_BxK, y_BxD), batch_size=_GATHERED)
    return sparse_kernels.row_products(feature_BxK, _rounded(W_FxD, how), y_BxD)


def feature_sums(
    entries: ByFeature, pairs: tuple[tuple[jax.Array, jax.Array], ...], how: Products
) -> tuple[jax.Array, ...] | list[jax.Array]:
    """``ByFeature.product`` of each pair of values and x, [F, D]."""
    if how.form == "rows":
        return tuple(entries.product(value_BxK, x_BxD) for value_BxK, x_BxD in pairs)
    terms = [(entries.entries(value_BxK)[1], _rounded(x_BxD, how)) for value_BxK, x_BxD in pairs]
    return sparse_kernels.segment_sums(entries.starts_X, entries.entries(pairs[0][0])[0], terms)


def _rounded(values: jax.Array, how: Products) -> jax.Array:
    return values.astype(jnp.bfloat16) if how.matmul_dtype == "bfloat16" else values
