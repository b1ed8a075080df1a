"""Matrix products with operands in a chosen dtype and sums in the arrays' dtype."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a_xK: jax.Array, b_KxN: jax.Array, matmul_dtype: str = "float32") -> jax.Array:
    """Return a @ b.

    With ``matmul_dtype="bfloat16"`` both operands are rounded to bfloat16 and the products summed in
    float32, in the forward pass and in both products of the backward pass. (Plain automatic differentiation
    would multiply the float32 cotangent with a bfloat16 operand.)

    Args:
      a_xK: any leading dimensions.
      b_KxN: a matrix.
      matmul_dtype: "float32" (the arrays' own dtype, to its full precision on every device) or "bfloat16".
    """
    return product(a_xK, b_KxN, matmul_dtype)


def product(a: jax.Array, b: jax.Array, matmul_dtype: str) -> jax.Array:
    """Return a @ b, for code that defines its own gradients; see ``matmul``."""
    if matmul_dtype == "bfloat16":
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.matmul(a, b, precision="highest")


def _forward(a, b, matmul_dtype):
    """Return the product, and what its gradient needs."""
    return product(a, b, matmul_dtype), (a, b)


def _backward(matmul_dtype, saved, cotangent_xN):
    """Return the gradients in both operands."""
    a_xK, b_KxN = saved
    return (
        product(cotangent_xN, transpose(b_KxN, matmul_dtype), matmul_dtype),
        transposed_product(_rows(a_xK), _rows(cotangent_xN), matmul_dtype),
    )


matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def centred_matmul(x_xK: jax.Array, centre_K: jax.Array, b_KxN: jax.Array, matmul_dtype: str = "float32") -> jax.Array:
    """Return (x - centre) @ b, with a centre subtracted from every row; see ``matmul``.

    The centre's gradient is minus the sum over rows of x's. Summed before it is multiplied it costs next to nothing,
    where nobody asks for x's gradient; otherwise a whole product, a sixth of a training step.
    """
    return product(_centred(x_xK, centre_K), b_KxN, matmul_dtype)


def _centred(x_xK, centre_K):
    """Return x less a vector."""
    return x_xK - centre_K.reshape((1,) * (x_xK.ndim - 1) + centre_K.shape)


def _forward_centred(x_xK, centre_K, b_KxN, matmul_dtype):
    """Return the product, and what its gradient needs."""
    centred_xK = _centred(x_xK, centre_K)
    return product(centred_xK, b_KxN, matmul_dtype), (centred_xK, b_KxN)


def _backward_centred(matmul_dtype, saved, cotangent_xN):
    """Return the gradients in x, the centre and the matrix."""
    to_x_xK, to_b_KxN = _backward(matmul_dtype, saved, cotangent_xN)
    # In fp32: it is the product of one row, and costs nothing.
    return to_x_xK, -product(saved[1], _rows(cotangent_xN).sum(0), "float32"), to_b_KxN


centred_matmul.defvjp(_forward_centred, _backward_centred)


def _rows(a_xK: jax.Array) -> jax.Array:
    """Return the array with all leading dimensions as one."""
    return a_xK.reshape(-1, a_xK.shape[-1])


def transposed_product(a_BxK: jax.Array, g_BxN: jax.Array, matmul_dtype: str) -> jax.Array:
    """Return a.T @ g; for bfloat16 the narrower is transposed, because on a CPU the transpose is written to memory.

    For ``matmul_dtype`` see ``matmul``.
    """
    if matmul_dtype != "bfloat16" or a_BxK.shape[-1] <= g_BxN.shape[-1]:
        return product(transpose(a_BxK, matmul_dtype), g_BxN, matmul_dtype)
    return _written_transpose(product(transpose(g_BxN, matmul_dtype), a_BxK, matmul_dtype))


def transpose(a_KxN: jax.Array, matmul_dtype: str) -> jax.Array:
    """Return the transpose, on a CPU written out in memory for products whose ``matmul_dtype`` is bfloat16.

    XLA:CPU multiplies bfloat16 matrices that are stored transposed at half the speed (measured on 1024 x 576 by
    576 x 4608: 50 ms against 27 ms, of which the copy is 4); GPUs and TPUs read either order.
    """
    return _written_transpose(a_KxN.astype(jnp.bfloat16)) if matmul_dtype == "bfloat16" else a_KxN.T


def _written_transpose(a_KxN: jax.Array) -> jax.Array:
    """Return the transpose, written out in memory on a CPU."""
    rows_first = Layout(major_to_minor=(0, 1))
    return lax.platform_dependent(
        a_KxN,
        cpu=lambda a: with_layout_constraint(with_layout_constraint(a, rows_first).T, rows_first),
        default=lambda a: a.T,
    )
