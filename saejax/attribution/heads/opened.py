"""What one head's query and keys read of the stream: the program of ``query_key``."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attention_weights, whole_prompts
from saejax.models.parameters import LAYERS


class Opened(NamedTuple):
    """A head's query at one position and its keys at those positions that it attends to most.

    Attributes:
      weight_J, key_J: how much it attends to each, falling, and where they are.
      score_J: scores.
      query_KxD, key_KxJxD: the directions of the stream, at their own positions, that each dimension reads.
      own_query_K, own_key_JxK: parts that are of no source.
    """

    weight_J: jax.Array
    key_J: jax.Array
    score_J: jax.Array
    query_KxD: jax.Array
    key_KxJxD: jax.Array
    own_query_K: jax.Array
    own_key_JxK: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def open_head(
    frozen: FrozenModel,
    keys: int,
    params: decoder.Params,
    layer: jax.Array,
    head: jax.Array,
    query: jax.Array,
    x_TxD: jax.Array,
) -> Opened:
    """What a head's query and keys read of the stream.

    Args:
      frozen: static.
      keys: how many keys; static.
      query: its position.
      x_TxD: the stream entering the layer, that of the prompt.
    """
    config, tables = frozen.config, whole_prompts(frozen.config, len(x_TxD))

    def meets(params: decoder.Params, x_TxD: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """The head's scaled queries and its keys, both [T, K], and its weights at the query [T]."""
        seen: list[tuple[tuple[jax.Array, jax.Array], jax.Array]] = []

        def look(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            weights_NxGxTxS = attention_weights(config, RELP, q, k, tables)
            weight_HxTxS = weights_NxGxTxS.reshape(config.n_heads, *weights_NxGxTxS.shape[-2:])
            of_key = head * config.n_kv_heads // config.n_heads
            seen.append(((q[:, head] * tables.scale, k[:, of_key]), weight_HxTxS[head, query]))
            return jnp.zeros_like(q)  # what comes after is not asked for

        frozen.layer(params, layer, tables, x_TxD, None, look)
        return seen[0]

    (q_TxK, k_TxK), pull, weight_S = jax.vjp(functools.partial(meets, params), x_TxD, has_aux=True)
    weight_J, key_J = lax.top_k(weight_S, keys)

    def read_by(unit_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The directions of one dimension: a query or a key reads nothing but its own position."""
        all_TxK, none_TxK = jnp.broadcast_to(unit_K, q_TxK.shape), jnp.zeros_like(q_TxK)
        return pull((all_TxK, none_TxK))[0][query], pull((none_TxK, all_TxK))[0][key_J]

    query_KxD, key_KxJxD = lax.map(read_by, jnp.eye(q_TxK.shape[-1], dtype=q_TxK.dtype))
    own_q_TxK, own_k_TxK = jnp.zeros_like(q_TxK), jnp.zeros_like(k_TxK)
    own = {name: value for name, value in params.items() if name.startswith(LAYERS) and "_bias" in name}
    if own:  # linear in the biases, so it is its own derivative along them
        with_biases = lambda own: meets({**params, **own}, x_TxD)[0]  # noqa: E731
        own_q_TxK, own_k_TxK = jax.jvp(with_biases, (own,), (own,))[1]
    score_J = jnp.sum(q_TxK[query][None] * k_TxK[key_J], axis=-1)
    return Opened(weight_J, key_J, score_J, query_KxD, key_KxJxD, own_q_TxK[query], own_k_TxK[key_J])
