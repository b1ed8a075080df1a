"""Links between shown features of consecutive dictionaries, by their directions.

Feature i writes a_i d_i (its activation times its decoder row) at a position; of this a_i <d_i, e_j> goes into the
pre-activation of feature j of the next dictionary, whose encoder column is e_j, if nothing between changes it. That is
the link's weight; where the next dictionary divides each token by its size, that is before the division. There is a
link if the cosine of d_i and e_j is larger than random directions' with the covariance of the lower decoder: a
target with k possible sources has a link from any of k such directions with probability ``_LEVEL``, about. Signed
dictionaries have negative activations: for d_i stands -d_i where a_i is negative, for e_j -e_j where feature j's is.

Links show what is carried through the stream. What a layer computes from it, and what attention moves between
positions, they do not see; ``measured`` tells which of them are causes.

Dictionaries that were trained from one start keep directions of it, which then pass for shared features: most links
join features of one number. Stacks of several sites start apart (``training.state``); of others, trust the measured
chains.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import ndtri

from saejax.dictionaries import Dictionary
from saejax.matching.track.firings import LayerFirings
from saejax.matching.track.stack import Stack

_LEVEL = 1e-3  # of a target's false links
_SOURCES = 3  # links kept into a feature, the strongest
_SAMPLE = 4096  # decoder rows that the covariance is taken from

Node = tuple[int, int, int]  # place of the dictionary in the stack, position, feature
Link = tuple[Node, Node, float]  # from the lower to the upper one, weight


def find_links(stack: Stack, shown: Sequence[LayerFirings]) -> list[Link]:
    """Return the links between consecutive dictionaries of a stack, whose shown features are given."""
    links, lower = list[Link](), None
    for index, layer in enumerate(stack):
        upper = layer.load()
        if lower is not None:
            links += _links_into(index, lower, upper, shown[index - 1], shown[index])
        lower = upper
    return links


def _links_into(
    place: int, lower: Dictionary, upper: Dictionary, low: LayerFirings, high: LayerFirings
) -> Iterator[Link]:
    """Yield the links into the dictionary at a place of the stack, of each target the strongest."""
    lower_U, upper_J = np.unique(low.feature_A), np.unique(high.feature_A)
    low_UxD = np.asarray(lower.restrict(lower_U).W_dec_FxD[...], np.float32)
    column_JxD = np.asarray(upper.restrict(upper_J).W_enc_DxF[...], np.float32).T
    if upper.config.input_norm in ("center", "layer_norm"):  # which read nothing of a token's mean
        column_JxD = column_JxD - column_JxD.mean(axis=1, keepdims=True)
    dot_UxJ = low_UxD @ column_JxD.T
    length_U, norm_J = np.linalg.norm(low_UxD, axis=1), np.linalg.norm(column_JxD, axis=1)
    cosine_UxJ = dot_UxJ / np.maximum(length_U[:, None] * norm_J[None], 1e-30)
    # Standard deviation of a random direction's cosine. Some thousand rows fix a second moment, and wide dictionaries
    # have hundreds of thousands.
    features = lower.config.n_features
    sampled = np.unique(np.linspace(0, features - 1, min(features, _SAMPLE)).astype(np.int64))
    sample_NxD = np.asarray(lower.restrict(sampled).W_dec_FxD[...], np.float32)
    unit_JxD = column_JxD / np.maximum(norm_J, 1e-30)[:, None]
    spread_J = np.sqrt(np.square(sample_NxD @ unit_JxD.T).sum(axis=0) / max(np.square(sample_NxD).sum(), 1e-30))
    for position in np.intersect1d(low.position_A, high.position_A).tolist():
        sources, targets = low.at(position), high.at(position)
        from_K, into_E = np.searchsorted(lower_U, sources.feature_A), np.searchsorted(upper_J, targets.feature_A)
        # Divided by the number of sources: with more of them, the largest chance cosine grows.
        bar_E = float(ndtri(1 - _LEVEL / len(from_K))) * spread_J[into_E]
        weight_KxE = sources.value_A[:, None] * dot_UxJ[np.ix_(from_K, into_E)]
        # Towards what the target has: a negative weight makes a negative activation.
        sign_E = np.sign(targets.value_A)
        cosine_KxE = cosine_UxJ[np.ix_(from_K, into_E)] * np.sign(sources.value_A)[:, None] * sign_E
        towards_KxE = np.where(cosine_KxE > bar_E, weight_KxE * sign_E, -np.inf)
        for e in range(len(into_E)):
            for k in np.argsort(-towards_KxE[:, e], kind="stable")[:_SOURCES]:
                if towards_KxE[k, e] > 0:
                    low_node = place - 1, position, int(sources.feature_A[k])
                    yield low_node, (place, position, int(targets.feature_A[e])), float(weight_KxE[k, e])


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
