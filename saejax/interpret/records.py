"""Records of features, as JSON: statistics from all firings of a feature on the search text, and from its weights.

A feature's firings are split by activation into ten groups of equal size (group 9 has the strongest). Samples of every
group are the firings with the largest ``priority``, so that each sample is uniform in its group without a random state.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.interpret import contexts
from saejax.interpret.attended import HeadShares
from saejax.interpret.detectors import PairCounts
from saejax.interpret.feature_record import FeatureCode, FeatureContext, FeatureRecord, LogitHistogram
from saejax.interpret.firings import Block, priority
from saejax.interpret.neighbours import OutputTokens, Together
from saejax.interpret.text import CodeCounts, CodedText

GROUPS = 10
LOWEST, BINS, PER_OCTAVE = -10, 40, 2  # histogram of activations: the first edge is 2^LOWEST
_POSITIONS = 12  # bins of positions: 0, 1, 2 to 3, 4 to 7, ...
_JOINT = 13  # bits of a feature of a block and one of its groups in a sort key
_TOGETHER = 6
_FREQUENT = 64  # codes on which a feature fires most often, among which the listed ones are
_BY_SUM, _BY_MEAN = 6, 6  # tokens listed, by summed and by mean activation
_TIMES = 3  # minimum frequency of a token that is listed by its mean activation


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

    store: Store  #: the store
    text: CodedText  #: its text
    place: np.ndarray  #: encoded places
    bases: Mapping[str, CodeCounts]  #: frequency of codes there, by family
    examples: int  #: number of contexts of the strongest firings
    draws: int  #: number of contexts from each tenth of the firings
    output: OutputTokens | None  #: tokens that features promote and suppress; None: unknown
    nearest: tuple[np.ndarray, np.ndarray]  #: indices and cosines of the nearest decoder rows, [F, n]
    together: Together  #: co-activation of features
    heads: HeadShares | None = None  #: attention shares of heads; None: not asked for

    def __post_init__(self):
        self._is_stored = np.zeros(len(self.store.documents.ids_T), bool)
        self._is_stored[self.place] = True

    def records(self, block: Block, tokens: PairCounts) -> list[FeatureRecord]:
        """Return the records of a block's features, without labels."""
        shapes = PairCounts(block, self.text.code("shape", block.place))
        looks = self.heads.of(block) if self.heads else [None] * block.size
        records = [self._of_weights(block, i) for i in range(block.size)]
        self._describe_firings(records, block, dict(token=tokens, shape=shapes))
        for record, look in zip(records, looks, strict=True):
            if look:
                record["attention"] = look
        return records

    def _describe_firings(
        self, records: Sequence[FeatureRecord], block: Block, pairs: Mapping[str, PairCounts]
    ) -> None:
        """Add statistics of firings to the records of a block's live features."""
        total, largest = sums(block)
        bins, position = histogram(block), positions(block, self.text)
        order = weakest_first(block)
        edges, (drawn, group) = tenths(block, order), group_draws(block, order, self.draws)
        partners = self.together.partners(block.first, block.size, _TOGETHER)
        for i, record in enumerate(records):
            if not record["fires"]:
                continue
            of_feature = slice(*np.searchsorted(block.feature[drawn], [i, i + 1]))
            strongest = contexts.strongest(block, self.store.documents, self.text, i, self.examples)
            grouped = zip(group[of_feature], self._contexts(block, i, block.place[drawn[of_feature]]), strict=True)
            record["mean"], record["max"] = short(total[i] / record["fires"]), short(largest[i])
            record["tenths"] = [short(edge) for edge in edges[i]]
            record["histogram"], record["positions"] = bins[i].tolist(), position[i].tolist()
            record["examples"] = self._contexts(block, i, strongest)
            record["groups"] = [FeatureContext(group=int(number), **context) for number, context in grouped]
            record["tokens"], record["shapes"] = (
                self._codes(pairs[family], i, family) for family in ("token", "shape")
            )
            record["together"] = [
                (int(partner), int(both), short(share))
                for partner, both, share in zip(*(part[i] for part in partners), strict=True)
                if both
            ]

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

    def _codes(self, pairs: PairCounts, feature: int, family: str) -> list[FeatureCode]:
        """Return the codes with the largest sums and the largest means of activation, sorted by sum."""
        of_feature = slice(*np.searchsorted(pairs.feature, [feature, feature + 1]))
        often = np.sort(np.argsort(-pairs.count[of_feature], kind="stable")[:_FREQUENT])
        code, hits, total = (column[of_feature][often] for column in (pairs.code, pairs.count, pairs.total))
        occurrences = self.bases[family][code]
        mean = total / occurrences
        listed = np.flatnonzero(occurrences >= _TIMES)
        by_mean = listed[np.argsort(-mean[listed], kind="stable")][:_BY_MEAN]
        by_sum = np.argsort(-total, kind="stable")[:_BY_SUM]
        return [
            FeatureCode(
                text=self.text.texts[code[n]] if family == "token" else self.text.says(family, int(code[n])),
                hits=int(hits[n]),
                occurrences=int(occurrences[n]),
                sum=short(total[n]),
                mean=short(mean[n]),
            )
            for n in (*by_sum, *(n for n in by_mean if n not in by_sum))
        ]
