"""TopK training from sparse codes: products with the active features only.

Of a token's F features k are active, so decoding and every product of its gradient take k / F of the dense form's
multiplications. The encoder's product stays. It is for one CPU device: ``jax.experimental.sparse`` multiplies matrices
in compressed rows by a kernel of jaxlib, while XLA's gathers and scatters are as slow as dense products. Processor time
in ms of 1,024 tokens, F 4,608, width 576 and k 32, dense in fp32, dense in bfloat16 and sparse: decoding 52, 21, 4; the
gradient of activations 49, 13, 9; gradient of a weight matrix 48, 55, 8.

The dense form (``sparsity.topk``, ``matmul``) serves in tests of this form, and everywhere else. Values and
gradients of both belong to the same function, up to rounding and up to ties with a token's k-th largest value.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.sparse import BCSR
from jax.sharding import Mesh

from saejax.dictionaries import selection
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError

_WINS_FROM = dict(float32=24, bfloat16=64)  # features per active one, by the dtype of dense products
_GATHERED = 16  # tokens whose decoder rows are gathered at once: they fit into a core's cache
_PACKED = 2**32  # numbers that 32 bits hold


def choose_form(form: str, mesh: Mesh, matmul_dtype: str, n_features: int, k: int) -> str:
    """Return the form of a training step's products: "dense" or "rows" (sparse).

    Args:
      form: one of them, or "auto": "rows" where a step was measured to be faster with them, else "dense".
      mesh: the devices.
      matmul_dtype: dtype of the dense products; see ``matmul``.
      n_features: F.
      k: maximum number of active features.

    Raises:
      UserError: "rows" is asked for on other devices than one CPU.
    """
    platform = mesh.devices.flat[0].platform
    one_cpu = platform == "cpu" and mesh.size == 1
    if form == "auto":
        return "rows" if one_cpu and n_features >= _WINS_FROM[matmul_dtype] * k else "dense"
    if form == "rows" and not one_cpu:
        devices = f"{mesh.size} of platform {platform}"
        raise UserError(f"products=rows is for one CPU device, and there are {devices}: use dense or auto")
    return form


class FeatureOrder(NamedTuple):
    """The entries of a code sorted by feature: N = B k of them."""

    order_N: jax.Array  #: their positions in the code, in order of its tokens
    starts_X: jax.Array  #: where each feature's entries begin, and the end of the last; F + 1 numbers

    @classmethod
    def of(cls, feature_BxK: jax.Array, n_features: int) -> "FeatureOrder":
        """Sort the features of each token, [B, K], out of ``n_features``."""
        feature_N = feature_BxK.reshape(-1)
        count = len(feature_N)
        if count * n_features < _PACKED:  # one number for both: XLA:CPU sorts single ones four times as fast
            position_N = jnp.arange(count, dtype=jnp.uint32)
            sorted_N = lax.sort(feature_N.astype(jnp.uint32) * jnp.uint32(count) + position_N, is_stable=False)
            order_N = sorted_N % jnp.uint32(count)
        else:
            order_N = jnp.argsort(feature_N)
        every_X = jnp.arange(n_features + 1, dtype=feature_N.dtype)
        starts_X = jnp.searchsorted(feature_N[order_N], every_X)
        return cls(order_N.astype(jnp.int32), starts_X.astype(jnp.int32))

    def transposed_product(self, value_BxK: jax.Array, x_BxD: jax.Array) -> jax.Array:
        """Return f.T @ x, [F, D], of the code f that has ``value_BxK`` in place of its values."""
        token_N, value_N = self.order_N // value_BxK.shape[1], value_BxK.reshape(-1)[self.order_N]
        return BCSR((value_N, token_N, self.starts_X), shape=(len(self.starts_X) - 1, len(x_BxD))) @ x_BxD


class SparseCode(NamedTuple):
    """The active features of B tokens, at most k of each."""

    value_BxK: jax.Array  #: their activations; 0 where there are no more
    feature_BxK: jax.Array  #: indices of these features, int32; arbitrary where the activation is 0
    by_feature: FeatureOrder  #: the same sorted by feature

    def dense(self) -> jax.Array:
        """Return the activations of all features, [B, F]."""
        count, features = len(self.value_BxK), len(self.by_feature.starts_X) - 1
        row_Bx1 = jnp.arange(count, dtype=jnp.int32)[:, None]
        zeros_BxF = jnp.zeros((count, features), self.value_BxK.dtype)
        # Added, not set: entries of value 0 may name a feature that another entry has.
        return zeros_BxF.at[row_Bx1, self.feature_BxK].add(self.value_BxK)

    def sums(self, value_BxK: jax.Array) -> jax.Array:
        """Return the sum of each feature's values, [F]."""
        zeros_F = jnp.zeros(len(self.by_feature.starts_X) - 1, value_BxK.dtype)
        return zeros_F.at[self.feature_BxK.reshape(-1)].add(value_BxK.reshape(-1))

    def firings(self) -> jax.Array:
        """Return on how many tokens each feature is active, fp32 [F]."""
        return self.sums((self.value_BxK > 0).astype(jnp.float32))

    def product(self, W_FxD: jax.Array) -> jax.Array:
        """Return f @ W, [B, D]."""
        count, max_k = self.value_BxK.shape
        starts_X = jnp.arange(0, count * max_k + 1, max_k, dtype=jnp.int32)
        entries = self.value_BxK.reshape(-1), self.feature_BxK.reshape(-1), starts_X
        return BCSR(entries, shape=(count, len(W_FxD))) @ W_FxD


class Encoder(NamedTuple):
    """The arrays that make codes of inputs: ``sparsity.topk((x - centre) @ W_enc + b_enc, k)``."""

    centre_D: jax.Array
    W_enc_DxF: jax.Array
    b_enc_F: jax.Array


class Explained(NamedTuple):
    """A batch encoded by a dictionary."""

    code: SparseCode  #: the active features
    pre_BxF: jax.Array  #: pre-activations of all features
    pre_for_auxk_BxF: jax.Array  #: the same, for AuxK, whose gradient is 0 while no feature is dead
    residual_BxO: jax.Array  #: targets minus f @ W_dec


def explain(
    x_BxD: jax.Array,
    y_BxO: jax.Array,
    encoder: Encoder,
    W_dec_FxO: jax.Array,
    k: int | jax.Array,
    max_k: int,
    matmul_dtype: str = "float32",
    any_dead: bool | jax.Array = True,
) -> Explained:
    """Return the codes f of x, and the residuals y - f @ W_dec.

    Args:
      x_BxD: inputs.
      y_BxO: targets without what is added to f @ W_dec.
      encoder: what makes the codes.
      W_dec_FxO: the decoder.
      k: 1 <= k <= ``max_k``; may be traced. Of values that tie with the k-th largest, the first ones are kept.
      max_k: the largest k there can be, at most F; static.
      matmul_dtype: dtype of the encoder's product; the others are in the arrays' dtype.
      any_dead: False promises that ``pre_for_auxk_BxF`` has gradient 0. The gradient of ``pre_BxF`` is always exact.
    """
    return _explain(x_BxD, y_BxO, encoder, W_dec_FxO, (jnp.asarray(k), jnp.asarray(any_dead)), max_k, matmul_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _explain(x_BxD, y_BxO, encoder, W_dec_FxO, flags, max_k, matmul_dtype):
    """Return codes and residuals; see ``explain``."""
    centred_BxD = x_BxD - encoder.centre_D[None]
    pre_BxF = matmul(centred_BxD, encoder.W_enc_DxF, matmul_dtype) + encoder.b_enc_F[None]
    value_BxK, feature_BxK = selection.k_largest(pre_BxF, flags[0], max_k)
    code = SparseCode(value_BxK, feature_BxK, FeatureOrder.of(feature_BxK, pre_BxF.shape[1]))
    return Explained(code, pre_BxF, pre_BxF, y_BxO - code.product(W_dec_FxO))


def _forward(*arguments):
    """Return codes and residuals, and what their gradients need."""
    *primals, max_k, matmul_dtype = arguments  # with symbolic zeros, arrays come with whether they are perturbed
    values = jax.tree.map(lambda primal: primal.value, tuple(primals), is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    x_BxD, _, encoder, W_dec_FxO, (_, any_dead) = values
    explained = _explain(*values, max_k, matmul_dtype)
    return explained, (x_BxD - encoder.centre_D[None], encoder.W_enc_DxF, W_dec_FxO, explained.code, any_dead)


def _backward(max_k, matmul_dtype, saved, to):
    """Return the gradients from the active features alone, as far as nothing depends on the others."""
    x_BxD, W_enc_DxF, W_dec_FxO, code, any_dead = saved
    to_residual_BxO = _instantiate(to.residual_BxO)
    to_value_BxK = _instantiate(to.code.value_BxK) - _products_at(code.feature_BxK, W_dec_FxO, to_residual_BxO)
    # Entries of value 0 only fill up a token's code: they are no features of it.
    to_value_BxK = jnp.where(code.value_BxK > 0, to_value_BxK, 0.0)
    to_W_enc_FxD = code.by_feature.transposed_product(to_value_BxK, x_BxD)
    to_W_dec_FxO = code.by_feature.transposed_product(-code.value_BxK, to_residual_BxO)

    def from_code() -> tuple[jax.Array, ...]:
        moved = code._replace(value_BxK=to_value_BxK)
        return moved.product(W_enc_DxF.T), to_W_enc_FxD.T, code.sums(to_value_BxK)

    def from_all(*to_pre: jax.Array) -> tuple[jax.Array, ...]:
        to_pre_BxF = sum(to_pre[1:], to_pre[0])
        pulled = jax.vjp(lambda x, W: matmul(x, W, matmul_dtype), x_BxD, W_enc_DxF)[1](to_pre_BxF)
        return jax.tree.map(jnp.add, from_code(), (*pulled, to_pre_BxF.sum(axis=0)))

    # Dense products only where something depends on pre-activations: statically for the kind's losses, and for AuxK,
    # which is always in the program, while there are dead features.
    to_pre = [part for part in (to.pre_BxF, to.pre_for_auxk_BxF) if not isinstance(part, SymbolicZero)]
    if not to_pre:
        gradients = from_code()
    elif isinstance(to.pre_BxF, SymbolicZero):
        gradients = lax.cond(any_dead, lambda: from_all(*to_pre), from_code)
    else:
        gradients = from_all(*to_pre)
    to_x_BxD, to_W_DxF, to_b_F = gradients
    to_centre_D = -(matmul(W_enc_DxF, to_b_F[:, None])[:, 0])
    return to_x_BxD, to_residual_BxO, Encoder(to_centre_D, to_W_DxF, to_b_F), to_W_dec_FxO, None


_explain.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiate(cotangent: Any) -> jax.Array:
    """Return a cotangent as an array, zeros where it is a symbolic zero."""
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


def _products_at(feature_BxK: jax.Array, W_FxO: jax.Array, y_BxO: jax.Array) -> jax.Array:
    """Return the entries of y @ W.T at each token's features; [B, K]."""

    def products_of_token(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        feature_K, y_O = pair
        return jnp.matmul(W_FxO[feature_K], y_O, precision="highest")

    return lax.map(products_of_token, (feature_BxK, y_BxO), batch_size=_GATHERED)
