"""Records of features, as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.interpret import contexts, describe
from saejax.interpret.attended import HeadShares
from saejax.interpret.describe import Associations
from saejax.interpret.detectors import PairCounts
from saejax.interpret.feature_record import FeatureCode, FeatureContext, FeatureRecord, LogitHistogram
from saejax.interpret.firings import Block
from saejax.interpret.neighbours import OutputTokens, Together
from saejax.interpret.text import CodeCounts, CodedText

_TOGETHER = 6
_BY_SUM, _BY_MEAN = 6, 6  # tokens listed, by summed and by mean activation
_TIMES = 3  # minimum frequency of a token that is listed by its mean activation


def short(value: float) -> float:
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


@dataclasses.dataclass
class Describer:
    """Makes the records of a dictionary's features, block by block.

    Attributes:
      store: the store.
      text: its text.
      place: encoded places.
      bases: frequency of codes there, by family.
      examples: number of contexts of the strongest firings.
      draws: number of contexts from each tenth of the firings.
      output: tokens that features promote and suppress; None: unknown.
      nearest: indices and cosines of the nearest decoder rows, [F, n].
      together: co-activation of features.
      heads: attention shares of heads; None: not asked for.
      layers: site of another layer's dictionary -> its feature with the nearest decoder row, and the cosine.
    """

    store: Store
    text: CodedText
    place: np.ndarray
    bases: Mapping[str, CodeCounts]
    examples: int
    draws: int
    output: OutputTokens | None
    nearest: tuple[np.ndarray, np.ndarray]
    together: Together
    heads: HeadShares | None = None
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._is_stored = np.zeros(len(self.store.documents.ids_T), bool)
        self._is_stored[self.place] = True
        self._fires: list[np.ndarray] = []
        self._p: list[np.ndarray] = []
        self._sorted_q: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def fires(self) -> np.ndarray:
        """Number of firings of each feature of the blocks so far."""
        return np.concatenate(self._fires)

    def records(self, block: Block, tokens: PairCounts) -> list[FeatureRecord]:
        """Return the records of a block's features, without labels, and with p-values in place of q-values."""
        shapes = PairCounts(block, self.text.code("shape", block.place))
        about = {
            family: describe.associations(block, pairs, self.bases[family], len(self.place))
            for family, pairs in (("token", tokens), ("shape", shapes))
        }
        self._fires.append(block.counts)
        self._p += [associations.p for associations in about.values()]
        looks = self.heads.of(block) if self.heads else [None] * block.size
        records = [self._of_weights(block, i) for i in range(block.size)]
        self._describe_firings(records, block, about)
        for record, look in zip(records, looks, strict=True):
            if look:
                record["attention"] = look
        return records

    def _describe_firings(
        self, records: Sequence[FeatureRecord], block: Block, about: Mapping[str, Associations]
    ) -> None:
        """Add statistics of firings to the records of a block's live features."""
        total, largest = describe.sums(block)
        bins, position = describe.histogram(block), describe.positions(block, self.text)
        order = describe.weakest_first(block)
        edges, (drawn, group) = describe.tenths(block, order), describe.group_draws(block, order, self.draws)
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
                self._codes(about[family], i, family) for family in ("token", "shape")
            )
            record["together"] = [
                (int(other), int(both), short(share))
                for other, both, share in zip(*(part[i] for part in partners), strict=True)
                if both
            ]

    def _contexts(self, block: Block, feature: int, places: Sequence[int] | np.ndarray) -> list[FeatureContext]:
        return contexts.contexts(block, self.text, self._is_stored, feature, places)

    def _of_weights(self, block: Block, number: int) -> FeatureRecord:
        """Return the record of a block's feature with its firing rate and the statistics of its weights."""
        feature, fires = block.first + number, int(block.counts[number])
        near = zip(*(part[feature] for part in self.nearest), strict=True)
        nearest = [(int(other), short(cosine)) for other, cosine in near]
        record = FeatureRecord(feature=feature, fires=fires, rate=short(fires / len(self.place)), nearest=nearest)
        if self.layers:
            across = self.layers.items()
            record["layers"] = [(site, int(ids[feature]), short(cosines[feature])) for site, (ids, cosines) in across]
        if self.output:
            ids, logits = self.output.ids[feature], self.output.logits[feature]
            pairs = [(self.text.texts[i], short(logit)) for i, logit in zip(ids, logits, strict=True)]
            record["up"], record["down"] = pairs[: len(pairs) // 2], pairs[: len(pairs) // 2 - 1 : -1]
            # The first is the largest of all logits, the last the smallest.
            counts = self.output.counts[feature].tolist()
            record["logits"] = LogitHistogram(low=short(logits[-1]), high=short(logits[0]), counts=counts)
        return record

    def _codes(self, about: Associations, feature: int, family: str) -> list[FeatureCode]:
        """Return the codes with the largest sums and the largest means of activation, sorted by sum."""
        rows = np.flatnonzero(about.feature == feature)
        mean = about.total[rows] / about.occurrences[rows]
        often = np.flatnonzero(about.occurrences[rows] >= _TIMES)
        by_mean = often[np.argsort(-mean[often], kind="stable")][:_BY_MEAN]
        by_sum = np.argsort(-about.total[rows], kind="stable")
        kept = [*by_sum[:_BY_SUM], *(i for i in by_mean if i not in by_sum[:_BY_SUM])]
        return [
            FeatureCode(
                text=self.text.texts[about.code[n]]
                if family == "token"
                else self.text.says(family, int(about.code[n])),
                hits=int(about.hits[n]),
                occurrences=int(about.occurrences[n]),
                sum=short(about.total[n]),
                mean=short(about.total[n] / about.occurrences[n]),
                pmi=short(about.pmi[n]),
                odds=[short(part[n]) for part in (about.odds, about.odds_low, about.odds_high)],
                p=float(about.p[n]),
            )
            for n in rows[kept]
        ]

    def adjust(self, record: FeatureRecord) -> None:
        """Replace p-values by q-values (Benjamini and Hochberg) once all blocks are done."""
        rows = [*record.get("tokens", ()), *record.get("shapes", ())]
        if rows:
            q = self.q_values(np.array([row["p"] for row in rows]))
            for row, q_value in zip(rows, q.tolist(), strict=True):
                row["q"] = short(q_value)
                del row["p"]

    def q_values(self, p: np.ndarray) -> np.ndarray:
        """Return q-values of p-values, over all pairs of a live feature and an occurring token or token shape."""
        if self._sorted_q is None:
            hypotheses = int((self.fires > 0).sum()) * sum(self.bases[family].codes for family in ("token", "shape"))
            self._sorted_q = describe.adjusted(np.concatenate(self._p), hypotheses)
        rising, q = self._sorted_q
        return q[np.searchsorted(rising, p, side="right") - 1]
