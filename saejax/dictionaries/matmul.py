"""Matrix products with operands in a chosen dtype and sums in the arrays' own."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a_BxK: jax.Array, b_KxN: jax.Array, operands: str = "float32") -> jax.Array:
    """a @ b.

    With ``operands="bfloat16"`` both operands are rounded to bfloat16 and the products summed in
    float32, in the forward pass and in both products of the backward pass. (Plain automatic differentiation
    would multiply the float32 cotangent with a bfloat16 operand.)

    Args:
      a_BxK: any leading dimensions.
      b_KxN: a matrix.
      operands: "float32" (the arrays' own dtype) or "bfloat16".
    """
    return _product(a_BxK, b_KxN, operands)


def _product(a: jax.Array, b: jax.Array, operands: str) -> jax.Array:
    if operands == "bfloat16":
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.matmul(a, b)


def _forward(a, b, operands):
    return _product(a, b, operands), (a, b)


def _backward(operands, saved, cotangent_BxN):
    a_BxK, b_KxN = saved
    flat_a, flat_g = a_BxK.reshape(-1, a_BxK.shape[-1]), cotangent_BxN.reshape(-1, cotangent_BxN.shape[-1])
    return (
        _product(cotangent_BxN, _transposed(b_KxN, operands), operands),
        _product(_transposed(flat_a, operands), flat_g, operands),
    )


def _transposed(a_KxN: jax.Array, operands: str) -> jax.Array:
    """The transpose, on a CPU written out in memory for bfloat16.

    XLA:CPU multiplies bfloat16 matrices that are stored transposed at half the speed (measured on 1024 x 576 by
    576 x 4608: 50 ms against 27 ms, of which the copy is 4); GPUs and TPUs read either order.
    """
    if operands != "bfloat16":
        return a_KxN.T
    rows_first = Layout(major_to_minor=(0, 1))
    return lax.platform_dependent(
        a_KxN.astype(jnp.bfloat16),
        cpu=lambda a: with_layout_constraint(a.T, rows_first),
        default=lambda a: a.T,
    )


matmul.defvjp(_forward, _backward)
