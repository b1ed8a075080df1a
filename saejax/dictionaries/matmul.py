"""Matrix products with operands in a chosen dtype and sums in the arrays' own."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a_xK: jax.Array, b_KxN: jax.Array, operands: str = "float32") -> jax.Array:
    """a @ b.

    With ``operands="bfloat16"`` both operands are rounded to bfloat16 and the products summed in
    float32, in the forward pass and in both products of the backward pass. (Plain automatic differentiation
    would multiply the float32 cotangent with a bfloat16 operand.)

    Args:
      a_xK: any leading dimensions.
      b_KxN: a matrix.
      operands: "float32" (the arrays' own dtype, to its full precision on every device) or "bfloat16".
    """
    return product(a_xK, b_KxN, operands)


def product(a: jax.Array, b: jax.Array, operands: str) -> jax.Array:
    """``matmul`` for programs that have gradients of their own.

    Args:
      a, b: as for ``matmul``.
      operands: as for ``matmul``.
    """
    if operands == "bfloat16":
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.matmul(a, b, precision="highest")


def _forward(a, b, operands):
    return product(a, b, operands), (a, b)


def _backward(operands, saved, cotangent_xN):
    a_xK, b_KxN = saved
    return (
        product(cotangent_xN, transposed(b_KxN, operands), operands),
        over_rows(_rows(a_xK), _rows(cotangent_xN), operands),
    )


matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def centred_matmul(x_xK: jax.Array, centre_K: jax.Array, b_KxN: jax.Array, operands: str = "float32") -> jax.Array:
    """(x - centre) @ b, as ``matmul``.

    The centre's gradient is minus the sum over rows of x's. Summed before it is multiplied it costs next to nothing,
    where nobody asks for x's gradient; otherwise a whole product, a sixth of a training step.
    """
    return product(_centred(x_xK, centre_K), b_KxN, operands)


def _centred(x_xK, centre_K):
    return x_xK - centre_K.reshape((1,) * (x_xK.ndim - 1) + centre_K.shape)


def _forward_centred(x_xK, centre_K, b_KxN, operands):
    centred_xK = _centred(x_xK, centre_K)
    return product(centred_xK, b_KxN, operands), (centred_xK, b_KxN)


def _backward_centred(operands, saved, cotangent_xN):
    to_x_xK, to_b_KxN = _backward(operands, saved, cotangent_xN)
    return to_x_xK, -product(saved[1], _rows(cotangent_xN).sum(0), "float32"), to_b_KxN


centred_matmul.defvjp(_forward_centred, _backward_centred)


def _rows(a_xK: jax.Array) -> jax.Array:
    return a_xK.reshape(-1, a_xK.shape[-1])


def over_rows(a_BxK: jax.Array, g_BxN: jax.Array, operands: str) -> jax.Array:
    """a.T @ g; for bfloat16 the narrower of the two is transposed, because on a CPU that is written out in memory.

    Args:
      a_BxK, g_BxN: matrices.
      operands: as for ``matmul``.
    """
    if operands != "bfloat16" or a_BxK.shape[-1] <= g_BxN.shape[-1]:
        return product(transposed(a_BxK, operands), g_BxN, operands)
    return _written_transpose(product(transposed(g_BxN, operands), a_BxK, operands))


def transposed(a_KxN: jax.Array, operands: str) -> jax.Array:
    """The transpose, on a CPU written out in memory for bfloat16.

    XLA:CPU multiplies bfloat16 matrices that are stored transposed at half the speed (measured on 1024 x 576 by
    576 x 4608: 50 ms against 27 ms, of which the copy is 4); GPUs and TPUs read either order.

    Args:
      a_KxN: a matrix.
      operands: as for ``matmul``.
    """
    return _written_transpose(a_KxN.astype(jnp.bfloat16)) if operands == "bfloat16" else a_KxN.T


def _written_transpose(a_KxN: jax.Array) -> jax.Array:
    rows_first = Layout(major_to_minor=(0, 1))
    return lax.platform_dependent(
        a_KxN,
        cpu=lambda a: with_layout_constraint(with_layout_constraint(a, rows_first).T, rows_first),
        default=lambda a: a.T,
    )
