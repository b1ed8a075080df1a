"""QK attribution: decompose an attention score over pairs of sources.

With norm scales and the attention weights of earlier layers frozen, the stream that enters a layer is the sum of what
the graph's sources add to it. So are the query at a position and the key at another, after their norms and their
rotation, but for a part that biases of the head's own layer give. The score before its softmax and before any capping
is then exactly a sum over pairs:

    score = scale q . k = sum over a, b of scale q[a] . k[b]

with q[a] the part of the query that comes from source a and k[b] that of the key from source b. The parts are what the
sources add to 2 K directions of the stream, one for each dimension of the query and the key (``LocalModel.pullback``).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.state import RELP, FrozenModel, layer_biases
from saejax.attribution.results import KeyScore, QueryScores, SourcePair
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attention_weights, whole_prompt_tables
from saejax.models.config import DecoderConfig
from saejax.parallel.collectives import to_host

OWN_BIAS = "own_bias"  # stands for the biases of the head's own layer, beside ids of nodes
_BLOCK = 1 << 22  # pairs that are in memory at once


class Opened(NamedTuple):
    """A head's query at one position and its keys at those positions that it attends to most."""

    #: weight_J and key_J: attention weights, falling, and positions of the keys.
    weight_J: jax.Array
    key_J: jax.Array
    score_J: jax.Array  #: scores
    #: query_KxD and key_KxJxD: the directions of the stream, at their own positions, that each dimension reads.
    query_KxD: jax.Array
    key_KxJxD: jax.Array
    #: bias_query_K and bias_key_JxK: parts that biases of the head's layer give.
    bias_query_K: jax.Array
    bias_key_JxK: jax.Array


def check_head(config: DecoderConfig, layer: int, head: int, position: int, tokens: int) -> int:
    """Return the position counted from the start, if there is such a head and such a position.

    Args:
      config: of the decoder.
      layer: of the head.
      head: its index in the layer.
      position: below 0, from the end.
      tokens: of the prompt.

    Raises:
      UserError: there is none.
    """
    if not (0 <= layer < config.n_layers and 0 <= head < config.n_heads):
        raise UserError(
            f"there is no head {layer}.{head}: expected a layer from 0 to {config.n_layers - 1} and a head from 0 to "
            f"{config.n_heads - 1}"
        )
    if not -tokens <= position < tokens:
        raise UserError(
            f"the prompt has no position {position} for head {layer}.{head}: it has {tokens} tokens, expected "
            f"{-tokens} to {tokens - 1}"
        )
    return position % tokens


def split_scores(
    local: LocalModel, layer: int, head: int, position: int = -1, keys: int = 3, pairs: int = 10
) -> QueryScores:
    """Decompose the scores of a query with the keys that it attends to most.

    Args:
      local: the local model of the prompt.
      layer: layer of the head.
      head: index of the head in the layer.
      position: position of the query; negative: from the end.
      keys: maximum number of keys.
      pairs: number of pairs that are listed for each score.

    Returns:
      A score for each key, in descending order of attention weight.

    Raises:
      UserError: there is no such head or position.
    """
    model = local.model
    position = check_head(model.config, layer, head, position, len(local.ids_P))
    names = [*local.sources.nodes.ids(model.config.n_layers), OWN_BIAS]
    x_TxD, where = local.stream_LxTxD[layer], (np.int32(layer), np.int32(head), np.int32(position))
    opened = Opened(*map(to_host, open_head(local.frozen, min(keys, len(x_TxD)), *where, x_TxD)))
    count = int((np.asarray(opened.weight_J) > 0).sum())  # fewer at early positions
    query_KxS, *part_JxKxS = _parts(local, opened, layer, position, count)
    scores = []
    for j, key_KxS in enumerate(part_JxKxS):
        query_N, key_N, part_N = _largest(query_KxS, key_KxS, pairs)
        # In float64, as the rest is what nearly equal sums leave.
        whole = float(query_KxS.sum(axis=1, dtype=np.float64) @ key_KxS.sum(axis=1, dtype=np.float64))
        largest = zip(query_N.tolist(), key_N.tolist(), part_N.tolist(), strict=True)
        listed = tuple(SourcePair(names[query], names[key], part) for query, key, part in largest)
        weight, score = float(opened.weight_J[j]), float(opened.score_J[j])
        scores.append(KeyScore(int(opened.key_J[j]), weight, score, listed, whole - float(part_N.sum())))
    return QueryScores(layer, head, position, tuple(scores))


def _parts(local: LocalModel, opened: Opened, layer: int, position: int, count: int) -> np.ndarray:
    """Return the parts of the query, and of the first ``count`` keys, that each source gives, the biases' last.

    Returns:
      fp32 [1 + count, K, S + 1].
    """
    # The query first and then the keys: one pullback takes all of their directions.
    vector_GxKxD = np.stack([opened.query_KxD, *np.moveaxis(opened.key_KxJxD, 1, 0)[:count]])
    groups, width = vector_GxKxD.shape[:2]
    position_G = np.array([position, *opened.key_J[:count]], np.int32)
    layer_R, position_R = np.full(groups * width, layer, np.int32), np.repeat(position_G, width)
    part_RxS = local.pullback(layer_R, position_R, vector_GxKxD.reshape(groups * width, -1), in_stream=True)
    bias_GxK = np.stack([opened.bias_query_K, *opened.bias_key_JxK[:count]])
    return np.concatenate([part_RxS.reshape(groups, width, -1), bias_GxK[..., None]], axis=2)


def _largest(query_KxS: np.ndarray, key_KxS: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the N pairs with the largest absolute products: query sources, key sources and products, each [N].

    A product is at most that of the two lengths. Query sources are read in descending order of length, until no
    remaining one can make a larger product.
    """
    of_query_S, of_key_S = np.linalg.norm(query_KxS, axis=0), np.linalg.norm(key_KxS, axis=0)  # lengths
    order, of_key = np.argsort(-of_query_S, kind="stable")[: (of_query_S > 0).sum()], np.flatnonzero(of_key_S)
    best = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    if not len(of_key):
        return best
    key_KxB, most = key_KxS[:, of_key].astype(np.float64), of_key_S.max()
    size = max(1, _BLOCK // len(of_key))
    for start in range(0, len(order), size):
        of_query = order[start : start + size]
        # From here on no pair can be larger: sources come by their lengths.
        if len(best[2]) == count and of_query_S[of_query[0]] * most < abs(best[2][-1]):
            break
        part_X = (query_KxS[:, of_query].astype(np.float64).T @ key_KxB).reshape(-1)
        top = np.argpartition(-np.abs(part_X), min(count, len(part_X)) - 1)[:count]
        row, column = np.divmod(top, len(of_key))
        block_best = of_query[row], of_key[column], part_X[top]
        joined = [np.concatenate(pair) for pair in zip(best, block_best, strict=True)]
        kept = np.argsort(-np.abs(joined[2]), kind="stable")[:count]
        best = joined[0][kept], joined[1][kept], joined[2][kept]
    return best


@functools.partial(jax.jit, static_argnums=1)
def open_head(
    frozen: FrozenModel, keys: int, layer: jax.Array, head: jax.Array, query: jax.Array, x_TxD: jax.Array
) -> Opened:
    """Return the directions along which a head's query and keys read the stream.

    Args:
      frozen: the model.
      keys: number of keys (static).
      layer: of the head.
      head: its index in the layer.
      query: its position.
      x_TxD: the stream entering the layer, that of the prompt.
    """
    config, tables = frozen.config, whole_prompt_tables(frozen.config, len(x_TxD))

    def meets(params: decoder.Params, x_TxD: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Return the head's scaled queries and its keys, both [T, K], and its weights at the query [T]."""
        seen: list[tuple[tuple[jax.Array, jax.Array], jax.Array]] = []

        def look(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            weights_NxGxTxS = attention_weights(config, RELP, q, k, tables)
            weight_HxTxS = weights_NxGxTxS.reshape(config.n_heads, *weights_NxGxTxS.shape[-2:])
            of_key = head * config.n_kv_heads // config.n_heads
            seen.append(((q[:, head] * tables.scale, k[:, of_key]), weight_HxTxS[head, query]))
            return jnp.zeros_like(q)  # what comes after is not asked for

        dataclasses.replace(frozen, params=params).layer(layer, tables, x_TxD, look)
        return seen[0]

    (q_TxK, k_TxK), pull, weight_S = jax.vjp(functools.partial(meets, frozen.params), x_TxD, has_aux=True)
    weight_J, key_J = lax.top_k(weight_S, keys)

    def read_by(unit_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the directions of a dimension: a query or a key reads nothing but its own position."""
        all_TxK, none_TxK = jnp.broadcast_to(unit_K, q_TxK.shape), jnp.zeros_like(q_TxK)
        return pull((all_TxK, none_TxK))[0][query], pull((none_TxK, all_TxK))[0][key_J]

    # Dimension by dimension: all at once would hold K streams.
    query_KxD, key_KxJxD = lax.map(read_by, jnp.eye(q_TxK.shape[-1], dtype=q_TxK.dtype))
    own_q_TxK, own_k_TxK = jnp.zeros_like(q_TxK), jnp.zeros_like(k_TxK)
    if biases := layer_biases(frozen.params):  # linear in the biases, so it is its own derivative along them
        with_biases = lambda biases: meets({**frozen.params, **biases}, x_TxD)[0]  # noqa: E731
        own_q_TxK, own_k_TxK = jax.jvp(with_biases, (biases,), (biases,))[1]
    score_J = jnp.sum(q_TxK[query][None] * k_TxK[key_J], axis=-1)
    return Opened(weight_J, key_J, score_J, query_KxD, key_KxJxD, own_q_TxK[query], own_k_TxK[key_J])
