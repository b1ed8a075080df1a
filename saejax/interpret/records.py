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
_TOKENS = 8  # listed of each feature


def histogram(value_A: np.ndarray) -> np.ndarray:
    """Return the histogram of a feature's activations, int64 [BINS]; values beyond the edges are in the outer bins."""
    bin_A = np.floor((np.log2(value_A) - LOWEST) * PER_OCTAVE).astype(np.int64)
    return np.bincount(np.clip(bin_A, 0, BINS - 1), minlength=BINS)


def tenths(value_A: np.ndarray) -> np.ndarray:
    """Return the edges of the ten groups of a feature's firings, at least one, float32 [11].

    Group g spans edge g up to, but without, edge g + 1; the last includes its maximum.
    """
    # Rounded up, because ``group_draws`` rounds down: an edge is then the first firing of its group.
    first = -(-np.arange(GROUPS + 1) * len(value_A) // GROUPS)
    return np.sort(value_A)[np.minimum(first, len(value_A) - 1)]


def group_draws(value_A: np.ndarray, place_A: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of the ten groups of a feature's firings.

    Args:
      value_A: activations.
      place_A: places.
      draws: number of firings from every group, if it has as many.

    Returns:
      Indices of firings, by group, then by falling priority; and the group of each.
    """
    order = np.argsort(value_A, kind="stable")
    group_A = np.arange(len(order)) * GROUPS // max(len(order), 1)
    # Inverted, so that the largest priorities come first in a rising sort that also keeps groups together.
    order = order[np.lexsort((~priority(place_A[order]), group_A))]
    kept = np.arange(len(order)) - np.searchsorted(group_A, group_A) < draws
    return order[kept], group_A[kept]


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

    def records(self, block: Block) -> list[FeatureRecord]:
        """Return the records of the features of a block of firings on the search text, without labels."""
        tokens = PairCounts(block, self.text.code("token", block.place))
        looks = self.heads.of(block) if self.heads else [None] * block.size
        records = [self._of_weights(block, i) for i in range(block.size)]
        for i, record in enumerate(records):
            if not record["fires"]:
                continue
            value_A, place_A = block.value[block.of(i)], block.place[block.of(i)]
            drawn, group = group_draws(value_A, place_A, self.draws)
            grouped = zip(group, self._contexts(block, i, place_A[drawn]), strict=True)
            record["mean"], record["max"] = short(value_A.mean(dtype=np.float64)), short(value_A.max())
            record["tenths"] = [short(edge) for edge in tenths(value_A)]
            record["histogram"] = histogram(value_A).tolist()
            strongest = contexts.strongest(block, self.text, i, self.examples)
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
        of_feature = tokens.of(feature)
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
