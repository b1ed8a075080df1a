"""Features chosen one after the other, each for what those before it leave of the input (MP-SAE; Costa et al., 2025).

    r_0 = x - b_dec
    i_t = argmax_i <r_(t-1), W_i>,   v_t = <r_(t-1), W_(i_t)>,   r_t = r_(t-1) - v_t W_(i_t),      t = 1 to k

W_i are the decoder's rows, of length 1, and f_i is the sum of the v_t with i_t = i. The search ends early where no
inner product is above 0. There is no encoder: ``W_enc`` is kept as the decoder's transpose, for tools that look at it.

The choice has no gradient. Given it, the v_t are the solution of a triangular system, so that the steps of the search
need not be kept for the backward pass: with the rows S [k, D] in the order of choice,

    (I + tril(S S^T, -1)) v = S (x - b_dec)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries.kinds.base import Arrays, Dictionary, EncoderInputs, Kind, Numbers
from saejax.dictionaries.matmul import product
from saejax.dictionaries.sparsity import row


class MatchingPursuit(Kind):
    """Greedy choice of k features on the residual, without an encoder; no penalty."""

    name = "matching_pursuit"
    about = "chooses k features one after the other, each for what those before it leave"
    reads = ("k",)
    numbers = ("k",)
    depends_on_decoder_norms = True
    rebuilds_input = True
    no_free_decoder = "leaves inner products with rows that have no length 1 in a matching_pursuit dictionary"

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return the inner products at which features were chosen; ``dictionary.config.k`` is the largest k."""
        config, arrays, x_xD = dictionary.config, dictionary.arrays, inputs.x_xD
        W_dec_FxD = jnp.asarray(arrays["W_dec_FxD"], x_xD.dtype)
        if config.centred:
            x_xD = x_xD - row(arrays["b_dec_D"], x_xD.ndim)
        x_NxD = x_xD.reshape(-1, config.d_in)
        constants = lax.stop_gradient(x_NxD), lax.stop_gradient(W_dec_FxD)
        index_NxK, is_chosen_NxK = _choose(*constants, numbers["k"], config.k, dictionary.matmul_dtype)
        rows_NxKxD = jnp.where(is_chosen_NxK[..., None], W_dec_FxD[index_NxK], 0.0)
        gram_NxKxK = jnp.einsum("nkd,nld->nkl", rows_NxKxD, rows_NxKxD, precision="highest")
        products_NxKx1 = jnp.einsum("nkd,nd->nk", rows_NxKxD, x_NxD, precision="highest")[..., None]
        # The diagonal and what is above it are not read.
        values_NxKx1 = lax.linalg.triangular_solve(
            gram_NxKxK, products_NxKx1, left_side=True, lower=True, unit_diagonal=True
        )
        f_NxF = jnp.zeros((len(x_NxD), config.n_features), x_NxD.dtype)
        # Above 0 but for rounding against the values of the search; a feature may be chosen twice.
        f_NxF = f_NxF.at[jnp.arange(len(x_NxD))[:, None], index_NxK].add(jax.nn.relu(values_NxKx1[..., 0]))
        return f_NxF.reshape(*x_xD.shape[:-1], config.n_features)

    def constrain(self, params: Arrays) -> Arrays:
        """Keep the encoder as the decoder's transpose."""
        return params | dict(W_enc_DxF=params["W_dec_FxD"].T)


# Compiled once for all calls outside of a program, which would compile its loop anew in each.
@functools.partial(jax.jit, static_argnames=("max_k", "matmul_dtype"), inline=True)
def _choose(
    x_NxD: jax.Array, W_dec_FxD: jax.Array, k: int | jax.Array, max_k: int, matmul_dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Return the features in the order of choice, int32 [N, max_k], and where one was chosen: at most the first k."""

    def choose(residual_NxD: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        best_N = jnp.argmax(product(residual_NxD, W_dec_FxD.T, matmul_dtype), axis=-1).astype(jnp.int32)
        row_NxD = W_dec_FxD[best_N]
        value_Nx1 = jnp.sum(residual_NxD * row_NxD, axis=-1, keepdims=True)
        is_chosen_Nx1 = (value_Nx1 > 0) & (t < k)
        residual_NxD = residual_NxD - jnp.where(is_chosen_Nx1, value_Nx1, 0.0) * row_NxD
        return residual_NxD, (best_N, is_chosen_Nx1[:, 0])

    _, (index_KxN, is_chosen_KxN) = lax.scan(choose, x_NxD, jnp.arange(max_k))
    return index_KxN.T, is_chosen_KxN.T
