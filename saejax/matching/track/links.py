"""Links between features of successive layers, for those that are shown.

geometry      between two consecutive dictionaries, at one position. Feature i writes a_i d_i (its activation times its
              decoder row); of this a_i <d_i, e_j> goes into the pre-activation of feature j, whose encoder column is
              e_j, if nothing between changes it. That is the link's weight. There is a link if the cosine of d_i and
              e_j is larger than those of random directions with the covariance of the lower decoder: a target with k
              possible sources has a link from any of k such directions with probability ``_LEVEL``, about.
attribution   with transcoders of all layers: edges of the prompt's attribution graph, between any positions.

Dictionaries that were trained from one start keep directions of it, which then pass for shared features: most links
join features of one number, and mean nothing. Stacks of several sites start apart (``training.state``).

Geometry sees what is carried through the stream. What a layer computes from it, and what attention moves between
positions, it does not see.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.special import ndtri

from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace
from saejax.dictionaries import Dictionary
from saejax.matching.track.firings import LayerFirings
from saejax.matching.track.stack import Stack
from saejax.models.language_model import LanguageModel

_LEVEL = 1e-3  # of a target's false links
_SOURCES = 3  # links kept into a feature, the strongest
_SAMPLE = 4096  # decoder rows that the covariance is taken from
GEOMETRY, ATTRIBUTION = "geometry", "attribution"

Node = tuple[int, int, int]  # place of the dictionary in the stack, position, feature
Link = tuple[Node, Node, float]  # from the lower to the upper one, weight


@dataclasses.dataclass(frozen=True)
class FeatureLinks:
    """Links between features of a text.

    Attributes:
      kind: GEOMETRY or ATTRIBUTION.
      links: all links.
    """

    kind: str
    links: Sequence[Link]

    @property
    def same_number(self) -> int:
        """Number of links that join features of one number: by chance, one in as many as there are features."""
        return sum(source[2] == target[2] for source, target, _ in self.links)


def geometry(stack: Stack, shown: Sequence[LayerFirings]) -> FeatureLinks:
    """Return the links between consecutive dictionaries by their directions.

    Args:
      stack: the dictionaries.
      shown: the features that are shown, for each dictionary.
    """
    links = list[Link]()
    lower = None
    for index, each in enumerate(stack.layers):
        upper = each.load()
        if lower is not None:
            pair = shown[index - 1], shown[index]
            links += _Cosines.between(lower, upper, *pair).links(index, *pair)
        lower = upper
    return FeatureLinks(GEOMETRY, links)


@dataclasses.dataclass(frozen=True)
class _Cosines:
    """Cosines of decoder rows of U lower features with encoder columns of J upper ones.

    Attributes:
      lower_U, upper_J: the features, rising.
      dot_UxJ, cosine_UxJ: of a row and a column.
      spread_J: standard deviation of the cosine of a random direction with each column.
    """

    lower_U: np.ndarray
    upper_J: np.ndarray
    dot_UxJ: np.ndarray
    cosine_UxJ: np.ndarray
    spread_J: np.ndarray

    @classmethod
    def between(cls, lower: Dictionary, upper: Dictionary, low: LayerFirings, high: LayerFirings) -> "_Cosines":
        lower_U, upper_J = np.unique(low.feature_A), np.unique(high.feature_A)
        W_dec_FxD = np.asarray(lower.arrays["W_dec_FxD"], np.float32)
        column_JxD = np.asarray(upper.arrays["W_enc_DxF"], np.float32)[:, upper_J].T
        norm_J, row_UxD = np.linalg.norm(column_JxD, axis=1), W_dec_FxD[lower_U]
        column_JxD = column_JxD / np.maximum(norm_J, 1e-30)[:, None]
        # Some thousand rows fix a second moment, and wide dictionaries have hundreds of thousands.
        sample_NxD = W_dec_FxD[_evenly(len(W_dec_FxD))]
        spread_J = np.sqrt(np.square(sample_NxD @ column_JxD.T).sum(axis=0) / max(np.square(sample_NxD).sum(), 1e-30))
        length_U = np.linalg.norm(row_UxD, axis=1)
        cosine_UxJ = (row_UxD @ column_JxD.T) / np.maximum(length_U, 1e-30)[:, None]
        dot_UxJ = cosine_UxJ * length_U[:, None] * norm_J[None]
        return cls(lower_U, upper_J, dot_UxJ, cosine_UxJ, spread_J)

    def links(self, place: int, low: LayerFirings, high: LayerFirings) -> Iterator[Link]:
        """Yield the links into the dictionary at a place of the stack, of each target the strongest."""
        for position in np.intersect1d(low.position_A, high.position_A).tolist():
            sources, targets = low.at(position), high.at(position)
            from_K, into_E = (
                np.searchsorted(ids, firings.feature_A)
                for ids, firings in ((self.lower_U, sources), (self.upper_J, targets))
            )
            # Divided by the number of sources: with more of them, the largest chance cosine grows.
            bar_E = float(ndtri(1 - _LEVEL / len(from_K))) * self.spread_J[into_E]
            weight_KxE = sources.value_A[:, None] * self.dot_UxJ[np.ix_(from_K, into_E)]
            weight_KxE = np.where(self.cosine_UxJ[np.ix_(from_K, into_E)] > bar_E, weight_KxE, -np.inf)
            for e, k in np.argwhere(np.sort(weight_KxE, axis=0)[::-1][:_SOURCES].T > 0):
                source = int(np.argsort(-weight_KxE[:, e], kind="stable")[k])
                low_node = place - 1, position, int(sources.feature_A[source])
                high_node = place, position, int(targets.feature_A[e])
                yield low_node, high_node, float(weight_KxE[source, e])


def attribution(
    lm: LanguageModel, transcoders: LayerTranscoders, ids_T: np.ndarray, target: int, shown: Sequence[LayerFirings]
) -> FeatureLinks:
    """Return links by the attribution graph of a text, of which the answer is the target.

    Args:
      lm: the language model.
      transcoders: its transcoders, one for each layer.
      ids_T: the text, up to where the answer is predicted.
      target: the answer's token.
      shown: the features that are shown, of each layer.
    """
    graph = trace(lm, transcoders, ids_T.tolist(), targets=[target], max_features=_SAMPLE)
    wanted = {
        (place, int(position), int(feature))
        for place, each in enumerate(shown)
        for position, feature in zip(each.position_A, each.feature_A, strict=True)
    }
    nodes, features = graph.nodes, graph.slice_of(FEATURE)
    keys = list(
        zip(nodes.layer_N[features].tolist(), nodes.position_N[features].tolist(), nodes.index_N[features].tolist())
    )
    # The graph has more features than the page shows.
    kept_A = np.array([key in wanted for key in keys], bool)
    links = list[Link]()
    for row in np.flatnonzero(kept_A):
        weight_A = np.where(kept_A, graph.adjacency_RxS[row, features], 0.0)
        for source in np.argsort(-np.abs(weight_A), kind="stable")[:_SOURCES]:
            if weight_A[source]:
                links.append((keys[source], keys[row], float(weight_A[source])))
    return FeatureLinks(ATTRIBUTION, links)


def chain(links: Sequence[Link], node: Node) -> set[Node]:
    """Return the nodes that a feature passes on to, and those from which it comes, itself included."""
    down: dict[Node, list[Node]] = {}
    up: dict[Node, list[Node]] = {}
    for source, target, _ in links:
        up.setdefault(source, []).append(target)
        down.setdefault(target, []).append(source)
    return _reached(up, node) | _reached(down, node)


def strongest_chains(links: Sequence[Link], count: int, most: int) -> list[list[Link]]:
    """Return the strongest chains of links, each from the lowest link up; no two of them share a node.

    Longer chains come first; of equal length, the one whose weakest link is strongest: a chain carries no more than it.

    Args:
      links: between consecutive dictionaries.
      count: chains at most.
      most: links of a chain at most.
    """
    into: dict[Node, list[Link]] = {}
    for link in links:
        into.setdefault(link[1], []).append(link)
    # The best chain of each number of links that ends at a node; lower dictionaries come first.
    best: dict[Node, dict[int, list[Link]]] = {}

    def strength(chain: Sequence[Link]) -> tuple[int, float]:
        return len(chain), min(abs(weight) for _, _, weight in chain)

    for node in sorted(into):
        chains: dict[int, list[Link]] = {}
        for link in into[node]:
            before = best.get(link[0], {})
            for longer in ([link], *([*chain, link] for length, chain in before.items() if length < most)):
                chains[len(longer)] = max(chains.get(len(longer), longer), longer, key=strength)
        best[node] = chains
    chosen: list[list[Link]] = []
    taken: set[Node] = set()
    for chain in sorted((chain for chains in best.values() for chain in chains.values()), key=strength, reverse=True):
        nodes = {chain[0][0], *(target for _, target, _ in chain)}
        if len(chosen) < count and not nodes & taken:
            chosen.append(chain)
            taken |= nodes
    return chosen


def _reached(steps: Mapping[Node, Sequence[Node]], node: Node) -> set[Node]:
    seen, waiting = {node}, [node]
    while waiting:
        new = [other for other in steps.get(waiting.pop(), ()) if other not in seen]
        seen.update(new)
        waiting += new
    return seen


def _evenly(count: int) -> np.ndarray:
    """Return the indices of at most ``_SAMPLE`` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.int64))
