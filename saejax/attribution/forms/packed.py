"""Edges of a graph as arrays for the page: a quarter of their JSON, in the order in which the page draws them.

Arrays are little-endian bytes in base64, the strongest edge first (``scores``), so that the page neither parses names
nor sorts. Weights are float32 where that loses nothing: where each is the shortest decimal of one, as in our documents.
"""

import base64
from typing import Any

import numpy as np

from saejax.attribution.forms.document import GraphDocument
from saejax.attribution.forms.scores import link_scores, ranked

_KEYS = {"source", "target", "weight"}


def packed_edges(document: GraphDocument) -> dict[str, Any]:
    """Return the links of a document as ``source``, ``target`` (indices of nodes), ``weight`` and ``score``.

    Args:
      document: a document that passes ``check_document``.

    Returns:
      Each array as its type in JavaScript and its bytes in base64. If any link has other keys, ``more`` lists those of
      each link, in the order of the arrays.
    """
    links, scores_E = document["links"], link_scores(document)
    order_E = ranked(document, scores_E)
    place = {node["node_id"]: n for n, node in enumerate(document["nodes"])}
    index = np.uint16 if len(place) <= 1 << 16 else np.uint32
    columns = {end: np.array([place[link[end]] for link in links], index)[order_E] for end in ("source", "target")}
    weight_E = np.array([link["weight"] for link in links], np.float64)[order_E]
    with np.errstate(over="ignore"):  # what float32 cannot hold stays float64
        single_E = weight_E.astype(np.float32)
    columns["weight"] = single_E if np.array_equal(shortest(single_E), weight_E) else weight_E
    columns["score"] = scores_E[order_E].astype(np.float32)
    packed: dict[str, Any] = {name: [_kind(column), _base64(column)] for name, column in columns.items()}
    if any(link.keys() - _KEYS for link in links):
        packed["more"] = [{key: links[e][key] for key in links[e].keys() - _KEYS} for e in order_E]
    return packed


def shortest(numbers: np.ndarray) -> np.ndarray:
    """fp32 numbers as fp64 with no more digits than tell them apart, in JSON half as long as their digits in fp64."""
    return numbers.astype(str).astype(np.float64)


def _kind(column: np.ndarray) -> str:
    return {"u": "Uint", "f": "Float"}[column.dtype.kind] + f"{8 * column.itemsize}Array"


def _base64(column: np.ndarray) -> str:
    return base64.b64encode(column.astype(column.dtype.newbyteorder("<")).tobytes()).decode()
