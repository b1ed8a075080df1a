"""Records of features, as JSON: statistics from all firings of a feature on the search text, and from its weights.

A feature's firings are split by activation into ten groups of equal size (group 9 has the strongest). Samples of every
group are the firings with the largest ``priority``, so that each sample is uniform in its group without a random state.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.interpret import contexts
from saejax.interpret.attended import HeadShares
from saejax.interpret.detectors import PairCounts
from saejax.interpret.feature_record import FeatureContext, FeatureRecord, FeatureToken, LogitHistogram
from saejax.interpret.firings import Block, priority
from saejax.interpret.neighbours import OutputTokens
from saejax.interpret.text import CodeCounts, CodedText

GROUPS = 10
LOWEST, BINS, PER_OCTAVE = -10, 40, 2  # histogram of activations: the first edge is 2^LOWEST
_JOINT = 13  # bits of a feature of a block and one of its groups in a sort key
_TOKENS = 8  # listed of each feature


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


def weakest_first(block: Block) -> np.ndarray:
    """Return the indices of the firings sorted by feature, then by activation."""
    # One key sorts several times as fast as two. Bits of floats above 0 rise with them.
    return np.argsort(block.feature << 32 | block.value.view(np.int32), kind="stable")


def tenths(block: Block, order: np.ndarray) -> np.ndarray:
    """Return the edges of each feature's ten groups, float32 [features, 11]; 0 where it never fires.

    Group g spans edge g up to, but without, edge g + 1; the last includes its maximum.
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


def short(value: float) -> float:
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


@dataclasses.dataclass
class Describer:
    """Makes the records of a dictionary's features, block by block."""

    text: CodedText  #: text of the store
    place: np.ndarray  #: encoded places
    token_counts: CodeCounts  #: frequency of tokens there
    examples: int  #: number of contexts of the strongest firings
    draws: int  #: number of contexts from each tenth of the firings
    output: OutputTokens | None  #: tokens that features promote and suppress; None: unknown
    nearest: tuple[np.ndarray, np.ndarray]  #: indices and cosines of the nearest decoder rows, [F, n]
    heads: HeadShares | None = None  #: attention shares of heads; None: not asked for

    def __post_init__(self):
        self._is_stored = np.zeros(len(self.text.documents.ids_T), bool)
        self._is_stored[self.place] = True

    def records(self, block: Block, tokens: PairCounts) -> list[FeatureRecord]:
        """Return the records of a block's features, without labels.

        Args:
          block: firings on the search text.
          tokens: its counts by token.
        """
        looks = self.heads.of(block) if self.heads else [None] * block.size
        (total, largest), bins, order = sums(block), histogram(block), weakest_first(block)
        edges, (drawn, group) = tenths(block, order), group_draws(block, order, self.draws)
        records = [self._of_weights(block, i) for i in range(block.size)]
        for i, record in enumerate(records):
            if not record["fires"]:
                continue
            of_feature = slice(*np.searchsorted(block.feature[drawn], [i, i + 1]))
            strongest = contexts.strongest(block, self.text, i, self.examples)
            grouped = zip(group[of_feature], self._contexts(block, i, block.place[drawn[of_feature]]), strict=True)
            record["mean"], record["max"] = short(total[i] / record["fires"]), short(largest[i])
            record["tenths"], record["histogram"] = [short(edge) for edge in edges[i]], bins[i].tolist()
            record["examples"] = self._contexts(block, i, strongest)
            record["groups"] = [FeatureContext(group=int(number), **context) for number, context in grouped]
            record["tokens"] = self._tokens(tokens, i)
            if look := looks[i]:
                record["attention"] = look
        return records

    def _contexts(self, block: Block, feature: int, places: Sequence[int] | np.ndarray) -> list[FeatureContext]:
        return contexts.contexts(block, self.text, self._is_stored, feature, places)

    def _of_weights(self, block: Block, number: int) -> FeatureRecord:
        """Return the record of a block's feature with its firing rate and the statistics of its weights."""
        feature, fires = block.first + number, int(block.counts[number])
        near = zip(*(part[feature] for part in self.nearest), strict=True)
        nearest = [(int(neighbour), short(cosine)) for neighbour, cosine in near]
        record = FeatureRecord(feature=feature, fires=fires, rate=short(fires / len(self.place)), nearest=nearest)
        if self.output:
            ids, logits = self.output.ids[feature], self.output.logits[feature]
            pairs = [(self.text.texts[i], short(logit)) for i, logit in zip(ids, logits, strict=True)]
            record["up"], record["down"] = pairs[: len(pairs) // 2], pairs[: len(pairs) // 2 - 1 : -1]
            # The first is the largest of all logits, the last the smallest.
            counts = self.output.counts[feature].tolist()
            record["logits"] = LogitHistogram(low=short(logits[-1]), high=short(logits[0]), counts=counts)
        return record

    def _tokens(self, tokens: PairCounts, feature: int) -> list[FeatureToken]:
        """Return the tokens with the largest sums of activation."""
        of_feature = slice(*np.searchsorted(tokens.feature, [feature, feature + 1]))
        best = of_feature.start + np.argsort(-tokens.total[of_feature], kind="stable")[:_TOKENS]
        occurrences = self.token_counts[tokens.code[best]]
        return [
            FeatureToken(
                text=self.text.texts[tokens.code[at]],
                hits=int(tokens.count[at]),
                occurrences=int(places),
                sum=short(tokens.total[at]),
                mean=short(tokens.total[at] / places),
            )
            for at, places in zip(best, occurrences, strict=True)
        ]
