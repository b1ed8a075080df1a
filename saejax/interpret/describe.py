"""Per-feature statistics, from all firings of a feature on the search text.

A feature's firings are split by activation into ten groups of equal size (group 9 has the strongest). Samples of every
group are the firings with the largest *priority*, a hash of the place, so that each sample is uniform in its group
without a random state.
"""

import dataclasses

import numpy as np
from scipy.stats import norm

from saejax.interpret.detectors import PairCounts
from saejax.interpret.firings import Block
from saejax.interpret.text import CodeCounts, CodedText

GROUPS = 10
LOWEST, BINS, PER_OCTAVE = -10, 40, 2  # histogram of activations: the first edge is 2^LOWEST
_POSITIONS = 12  # bins of positions: 0, 1, 2 to 3, 4 to 7, ...
_JOINT = 13  # bits of a feature of a block and one of its groups in a sort key
_BLOCK_CODES = 64  # most frequent codes of each feature whose associations are tested


@dataclasses.dataclass(frozen=True)
class Associations:
    """Associations of features and codes: a row for each pair, sorted by feature.

    Attributes:
      feature: feature of each pair, counted from the block's first.
      code: code of each pair.
      hits: places of the code at which the feature fires.
      occurrences: places of the code.
      total: summed activation on these.
      pmi: pointwise mutual information of firing and code, in bits.
      odds: odds ratio (Woolf, 1955, half a count added to each cell).
      odds_low: lower end of its 95 % interval.
      odds_high: upper end of its 95 % interval.
      p: one-sided p-value of the odds ratio being at most 1.
    """

    feature: np.ndarray
    code: np.ndarray
    hits: np.ndarray
    occurrences: np.ndarray
    total: np.ndarray
    pmi: np.ndarray
    odds: np.ndarray
    odds_low: np.ndarray
    odds_high: np.ndarray
    p: np.ndarray


def priority(place: np.ndarray) -> np.ndarray:
    """Return a fixed random number for every place, uint64 (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    z = place.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def histogram(block: Block) -> np.ndarray:
    """Return histograms of activations, int64 [features, BINS]; values beyond the edges are in the outermost bins."""
    bin_ = np.floor((np.log2(block.value) - LOWEST) * PER_OCTAVE).astype(np.int64)
    joint = block.feature * BINS + np.clip(bin_, 0, BINS - 1)
    return np.bincount(joint, minlength=block.size * BINS).reshape(block.size, BINS)


def sums(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and maximum of every feature's activations, float64 [features]; 0 where it never fires."""
    total, largest = np.bincount(block.feature, block.value, block.size), np.zeros(block.size)
    np.maximum.at(largest, block.feature, block.value)
    return total, largest


def position_bins(position: np.ndarray) -> np.ndarray:
    """Return bins of positions: 0, 1, 2 to 3, 4 to 7, ..."""
    return np.minimum(np.ceil(np.log2(position + 1)).astype(np.int64), _POSITIONS - 1)


def positions(block: Block, text: CodedText) -> np.ndarray:
    """Return firings by bin of position, int64 [features, bins]."""
    joint = block.feature * _POSITIONS + position_bins(text.position(block.place))
    return np.bincount(joint, minlength=block.size * _POSITIONS).reshape(block.size, _POSITIONS)


def weakest_first(block: Block) -> np.ndarray:
    """Return the indices of the firings sorted by feature, then by activation."""
    # One key sorts several times as fast as two. Bits of floats above 0 rise with them.
    return np.argsort(block.feature << 32 | block.value.view(np.int32), kind="stable")


def tenths(block: Block, order: np.ndarray) -> np.ndarray:
    """Return the edges of each feature's ten groups, float32 [features, 11]; 0 where it never fires.

    Group g spans edge g up to, but without, edge g + 1; the last includes its maximum.

    Args:
      block: firings.
      order: result of ``weakest_first``.
    """
    counts, edges = block.counts[:, None], np.zeros((block.size, GROUPS + 1), np.float32)
    if len(order):
        # Rounded up, because ``group_draws`` rounds down: an edge is then the first firing of its group.
        first = np.minimum(-(-np.arange(GROUPS + 1) * counts // GROUPS), counts - 1)
        edges = block.value[order[np.maximum(block.starts[:-1, None] + first, 0)]]
    return np.where(counts > 0, edges, 0)


def group_draws(block: Block, order: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of each feature's ten groups.

    Args:
      block: firings.
      order: result of ``weakest_first``.
      draws: number of firings from every group, if it has as many.

    Returns:
      Indices in the block's firings, by feature, then by group, then by falling priority; and the group of each.
    """
    rank = np.arange(len(order)) - block.starts[block.feature[order]]
    group = rank * GROUPS // np.maximum(block.counts, 1)[block.feature[order]]
    joint = block.feature[order] * GROUPS + group
    # Inverted, so that the largest priorities come first in a rising sort that also keeps groups together.
    last = ~priority(block.place[order]) >> np.uint64(_JOINT)
    by_priority = np.argsort(joint.astype(np.uint64) << np.uint64(64 - _JOINT) | last)
    joint = joint[by_priority]
    first = np.searchsorted(joint, np.arange(block.size * GROUPS))
    kept = np.arange(len(joint)) - first[joint] < draws
    return order[by_priority][kept], joint[kept] % GROUPS


def associations(block: Block, pairs: PairCounts, base: CodeCounts, places: int) -> Associations:
    """Return the associations of every feature with the codes of a family on which it fires most often.

    Args:
      block: firings on the search text.
      pairs: the block's counts of the family.
      base: frequency of each code in the search text.
      places: number of places of the search text.
    """
    order = np.lexsort((-pairs.count, pairs.feature))
    rank = np.arange(len(order)) - np.searchsorted(pairs.feature, np.arange(block.size))[pairs.feature[order]]
    kept = np.sort(order[rank < _BLOCK_CODES])
    feature, code, hits = pairs.feature[kept], pairs.code[kept], pairs.count[kept]
    occurrences, fires = base[code], block.counts[feature]
    cells = [hits, occurrences - hits, fires - hits, places - occurrences - fires + hits]
    # Half a count in each cell: a pair that always or never occurs together would have an infinite odds ratio.
    a, b, c, d = (cell + 0.5 for cell in cells)
    log_odds, error = np.log(a * d / (b * c)), np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return Associations(
        feature,
        code,
        hits,
        occurrences,
        pairs.total[kept],
        np.log2(hits * places / (occurrences * fires)),
        np.exp(log_odds),
        np.exp(log_odds - 1.96 * error),
        np.exp(log_odds + 1.96 * error),
        norm.sf(log_odds / error),
    )


def adjusted(p: np.ndarray, hypotheses: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Benjamini and Hochberg's q-values (1995).

    Args:
      p: computed p-values; those of all other hypotheses count as 1.
      hypotheses: number of hypotheses.

    Returns:
      The p-values in ascending order, and the q-value of each.
    """
    rising = np.sort(p)
    # Ranks among the computed p-values are ranks among all, since the others count as 1.
    q = rising * hypotheses / np.arange(1, len(rising) + 1)
    return rising, np.minimum(np.minimum.accumulate(q[::-1])[::-1], 1.0)
