"""Matrix products with operands in a chosen dtype and sums in the arrays' own."""

import functools

import jax
import jax.numpy as jnp


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
    return _product(cotangent_BxN, b_KxN.T, operands), _product(flat_a.T, flat_g, operands)


matmul.defvjp(_forward, _backward)
