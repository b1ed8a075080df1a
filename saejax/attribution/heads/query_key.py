"""Why a head looks where it looks: its scores, split over pairs of sources.

With the factors of norms and the attention weights of earlier layers frozen, the stream that enters a layer is the
sum of what the graph's sources add to it. So are the query at a position and the key at another, after their norms
and their rotation, but for a part of their own that biases of the head's layer give. The score before its softmax and
before any capping is then a sum over pairs, exactly:

    score = scale q . k = sum over a, b of scale q[a] . k[b]

with q[a] the part of the query that comes from source a and k[b] that of the key from source b. The parts are what the
sources contribute to 2 K directions of the stream, which the program that attributes features reads off.
"""

import dataclasses
from typing import Any

import numpy as np

from saejax.attribution.heads.opened import Opened, open_head
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.trace.rows import RowTracer
from saejax.attribution.trace.sources import Sources
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.parallel.collectives import to_host

_BLOCK = 1 << 22  # pairs that are in memory at once


@dataclasses.dataclass(frozen=True)
class HeadScore:
    """The score of a query with a key, and the pairs of sources that make it.

    Attributes:
      layer, head: which head.
      query, key: positions.
      weight: how much the query attends to the key, 0 to 1.
      value: the score as the model has it: scaled, before capping and softmax.
      query_N, key_N: sources of the largest pairs, by their place in ``Sources.nodes``; its length stands for the
        biases of the head's own layer.
      part_N: float64 what each pair adds to the score, the largest by size first.
      rest: what all other pairs add.
    """

    layer: int
    head: int
    query: int
    key: int
    weight: float
    value: float
    query_N: np.ndarray
    key_N: np.ndarray
    part_N: np.ndarray
    rest: float


def check_head(config: DecoderConfig, layer: int, head: int, position: int, tokens: int) -> int:
    """The position from the start, if there is such a head and such a position.

    Args:
      config: of the decoder.
      layer, head: which head.
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
    replacement: Replacement,
    sources: Sources,
    layer: int,
    head: int,
    position: int = -1,
    keys: int = 3,
    pairs: int = 10,
) -> list[HeadScore]:
    """Splits the scores of a query with the keys that it attends to most.

    Args:
      replacement: the local replacement model of a prompt, such as ``trace_prompt(...).replacement``.
      sources: ``Sources.of(replacement)``.
      layer, head: which head.
      position: of the query; below 0, from the end.
      keys: most keys.
      pairs: how many pairs of each score are told apart.

    Returns:
      A score for each key, that of the largest attention weight first.

    Raises:
      UserError: there is no such head or position.
    """
    config, model, tokens = replacement.frozen.config, replacement.model, len(replacement.ids_P)
    position = check_head(config, layer, head, position, tokens)
    where = np.int32(layer), np.int32(head), np.int32(position)
    x_TxD = replacement.stream_LxTxD[layer]
    opened = Opened(*map(to_host, open_head(replacement.frozen, min(keys, len(x_TxD)), model.params, *where, x_TxD)))
    count = int((np.asarray(opened.weight_J) > 0).sum())  # fewer at early positions
    part_GxKxS = _parts(replacement, sources, opened, layer, position, count)
    scores = []
    for j, part_KxS in enumerate(part_GxKxS[1:]):
        query_N, key_N, part_N = _largest(part_GxKxS[0], part_KxS, pairs)
        whole = float(part_GxKxS[0].sum(axis=1, dtype=np.float64) @ part_KxS.sum(axis=1, dtype=np.float64))
        found: dict[str, Any] = dict(query_N=query_N, key_N=key_N, part_N=part_N, rest=whole - float(part_N.sum()))
        found |= dict(weight=float(opened.weight_J[j]), value=float(opened.score_J[j]))
        scores.append(HeadScore(layer=layer, head=head, query=position, key=int(opened.key_J[j]), **found))
    return scores


def _parts(
    replacement: Replacement, sources: Sources, opened: Opened, layer: int, position: int, count: int
) -> np.ndarray:
    """The parts of the query, and of the first ``count`` keys, that each source gives, the head's own last.

    Returns:
      fp32 [1 + count, K, S + 1].
    """
    vector_GxKxD = np.stack([opened.query_KxD, *np.moveaxis(opened.key_KxJxD, 1, 0)[:count]])
    groups, width = vector_GxKxD.shape[:2]
    position_G = np.array([position, *opened.key_J[:count]], np.int32)
    part_RxS = np.zeros((groups * width, len(sources.nodes)), np.float32)
    rows = RowTracer(replacement, sources, len(part_RxS))
    layer_R, position_R = np.full(len(part_RxS), layer, np.int32), np.repeat(position_G, width)
    rows(layer_R, position_R, vector_GxKxD.reshape(len(part_RxS), -1), part_RxS.__setitem__, in_stream=True)
    own_GxK = np.stack([opened.own_query_K, *opened.own_key_JxK[:count]])
    return np.concatenate([part_RxS.reshape(groups, width, -1), own_GxK[..., None]], axis=2)


def _largest(query_KxS: np.ndarray, key_KxS: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs with the largest products by size: the query's source, the key's, and the product, each [N].

    No product is larger than that of the lengths, so sources of the query go from long ones to short ones until none
    that is left can make a larger pair.
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
        if len(best[2]) == count and of_query_S[of_query[0]] * most < abs(best[2][-1]):
            break
        part_X = (query_KxS[:, of_query].astype(np.float64).T @ key_KxB).reshape(-1)
        top = np.argpartition(-np.abs(part_X), min(count, len(part_X)) - 1)[:count]
        row, column = np.divmod(top, len(of_key))
        found = of_query[row], of_key[column], part_X[top]
        joined = [np.concatenate(pair) for pair in zip(best, found, strict=True)]
        kept = np.argsort(-np.abs(joined[2]), kind="stable")[:count]
        best = joined[0][kept], joined[1][kept], joined[2][kept]
    return best
