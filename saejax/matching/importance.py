"""Do two models find the same features important for a benchmark? Features are matched by their activity on its items.

1. Both models read the same items; their tokens are paired where they end at the same character.
2. Two features are a pair if, over these tokens, the correlation of their activations is each one's largest with any
   feature of the other model, and at least ``LEAST``. The same with one text shifted by half is what chance gives.
3. The statistic is Spearman's correlation of the importance of paired features (attribution for the right answers),
   with a permutation p-value.
4. Two placebos: pairs with a rotated dictionary of the second model, and the importance in one model against that for
   corrupted answers in the other. What is important for any answer makes both agree, the right one or not.
"""

import dataclasses
from pathlib import Path

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.matching.transfer.activity import MIN_FIRINGS, Activity, ReadText, aligned, encode, read_text, site_values
from saejax.models.language_model import LanguageModel

LEAST = 0.5  # correlation of the activations of a pair
PLACEBO_QUANTILE = 0.95
_BATCH_TOKENS = 2048
_PERMUTATIONS, _PAIRS = 9999, 8  # fewer pairs have no rank correlation to speak of
_PRODUCTS = 2**24  # products held at once
_ARRAYS = ("text_N", "end_N", "importance_F", "placebo_RxF")  # of ``ItemFeatures``, in its file


@dataclasses.dataclass(frozen=True)
class ItemFeatures:
    """A dictionary's features on the items of a benchmark, in one model."""

    ids: tuple[str, ...]  #: names of the items
    activity: Activity  #: activations at the tokens of all items
    #: text_N and end_N: as in ``ReadText``.
    text_N: np.ndarray
    end_N: np.ndarray
    importance_F: np.ndarray  #: attribution of each feature for the right answers, nats
    placebo_RxF: np.ndarray  #: the same for corrupted answers, by placebo target; no rows: not measured

    def save(self, path: Path) -> None:
        """Write the features to a .npz file."""
        self.activity.save(path, ids=np.array(self.ids), **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: Path) -> "ItemFeatures":
        """Read what ``save`` wrote."""
        activity = Activity.load(path)
        with np.load(path) as parts:
            return cls(tuple(parts["ids"].tolist()), activity, **{name: parts[name] for name in _ARRAYS})

    @property
    def read(self) -> ReadText:
        """The tokens, without their ids."""
        return ReadText((), 0, self.text_N, self.end_N)


@dataclasses.dataclass(frozen=True)
class ImportanceAlignment:
    """Agreement of two models on which features matter."""

    pairs: int  #: number of matched features
    shared: float  #: share of the first model's features, of those that fire often enough, that have a partner
    shared_null: float  #: the same with one text shifted by half
    correlation: float | None  #: rank correlation of importance over pairs; None with fewer than 8 pairs
    p_value: float | None  #: share of permutations in which it is as large, above 0
    rotated: float | None  #: correlation over pairs with a rotated dictionary; None with fewer than 8 pairs
    #: 95 % quantile of the correlations with the importance for corrupted answers; None: not measured.
    placebo: float | None


def read_features(
    lm: LanguageModel, dictionary: Dictionary, texts: dict[str, str], importance_F: np.ndarray, placebo_RxF: np.ndarray
) -> ItemFeatures:
    """Return a dictionary's features on the texts of items.

    Args:
      lm: the model.
      dictionary: the dictionary.
      texts: text of each item, by its name.
      importance_F: attribution for the right answers.
      placebo_RxF: attribution for corrupted answers.
    """
    read = read_text(lm.tokenizer, list(texts.values()), lm.config.context)
    value_NxD = site_values(lm, read, [dictionary.site], _BATCH_TOKENS)[dictionary.site]
    activity = encode(dictionary.with_sink_norms(lm.sink_norm), value_NxD, _BATCH_TOKENS)
    return ItemFeatures(tuple(texts), activity, read.text_N, read.end_N, importance_F, placebo_RxF)


def align_importance(
    first: ItemFeatures, second: ItemFeatures, rotated: ItemFeatures | None = None, seed: int = 789
) -> ImportanceAlignment | None:
    """Return the agreement of two models on the same items; None where they read other items.

    Args:
      first: features of a model.
      second: features of another model.
      rotated: those of a rotated dictionary of the second model.
      seed: seed of the permutations.
    """
    if first.ids != second.ids:
        return None
    pairs, live = match_features(first, second)
    shifted, _ = match_features(first, second, shift=True)
    first_M, second_M = first.importance_F[pairs[0]], second.importance_F[pairs[1]]
    correlation, p_value, rotated_correlation, values = None, None, None, list[float]()
    if len(first_M) >= _PAIRS:
        correlation, p_value = rank_correlation(first_M, second_M, seed)
    if correlation is not None:
        # Either model may be the one whose importance is for corrupted answers: both directions are placebos.
        values = [_spearman(first_M, placebo_F[pairs[1]]) for placebo_F in second.placebo_RxF]
        values += [_spearman(placebo_F[pairs[0]], second_M) for placebo_F in first.placebo_RxF]
    if rotated is not None:
        (first_R, rotated_R), _ = match_features(first, rotated)
        if len(first_R) >= _PAIRS:
            rotated_correlation = _spearman(first.importance_F[first_R], rotated.importance_F[rotated_R])
    return ImportanceAlignment(
        pairs=len(first_M),
        shared=len(first_M) / max(live, 1),
        shared_null=len(shifted[0]) / max(live, 1),
        correlation=correlation,
        p_value=p_value,
        rotated=rotated_correlation,
        placebo=float(np.quantile(values, PLACEBO_QUANTILE, method="higher")) if values else None,
    )


def match_features(
    first: ItemFeatures, second: ItemFeatures, shift: bool = False
) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Return the pairs of features by activity, and the number of the first's features that could have one.

    Args:
      first: features of a model.
      second: features of another model on the same items.
      shift: pair each token with that half the text further on: what chance gives.

    Returns:
      The features of the first, rising, and their partners in the second; and the number.
    """
    first_N, second_N = aligned(first.read, second.read)
    real_N = first.activity.real_N[first_N] & second.activity.real_N[second_N]
    first_N, second_N = first_N[real_N], second_N[real_N]
    if shift:
        # Half the text away: runs of firings keep their form, and no pair of tokens stays a pair.
        second_N = np.roll(second_N, len(second_N) // 2)
    live, rows = [], []
    for features, at_N in ((first, first_N), (second, second_N)):
        live.append(features.activity.firings(at_N) >= MIN_FIRINGS)
        rows.append(features.activity.rows(at_N, live[-1]))
    return mutual_pairs(rows[0], rows[1], LEAST), int(live[0].sum())


def mutual_pairs(first_FxD: np.ndarray, second_GxD: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of rows with their largest product, of at least ``least``, with each other.

    Args:
      first_FxD: rows of the first dictionary.
      second_GxD: rows of the second.
      least: smallest product of a pair.
    """
    if not len(first_FxD) or not len(second_GxD):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    best_G, largest_G = np.zeros(len(second_GxD), np.int64), np.full(len(second_GxD), -np.inf)
    best, largest = [], []
    step = max(_PRODUCTS // len(second_GxD), 1)
    for start in range(0, len(first_FxD), step):
        product_KxG = first_FxD[start : start + step] @ second_GxD.T
        best.append(product_KxG.argmax(axis=1))
        largest.append(product_KxG.max(axis=1))
        larger_G = product_KxG.max(axis=0) > largest_G
        best_G[larger_G] = start + product_KxG.argmax(axis=0)[larger_G]
        largest_G = np.maximum(largest_G, product_KxG.max(axis=0))
    best_F = np.concatenate(best)
    paired = (best_G[best_F] == np.arange(len(best_F))) & (np.concatenate(largest) >= least)
    return np.flatnonzero(paired), best_F[paired]


def rank_correlation(
    first_N: np.ndarray, second_N: np.ndarray, seed: int = 789
) -> tuple[float, float] | tuple[None, None]:
    """Return Spearman's correlation and its permutation p-value; None if it is not defined.

    Args:
      first_N: finite numbers of N things.
      second_N: others of the same things.
      seed: seed of the permutations.
    """
    if len(first_N) < 3 or np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return None, None
    one_N, two_N = _unit_ranks(first_N), _unit_ranks(second_N)
    rng, measured = np.random.default_rng(seed), float(one_N @ two_N)
    # A tolerance, because sums of the same products in another order differ in their last digits.
    as_large = sum(float(rng.permutation(one_N) @ two_N) >= measured - 1e-12 for _ in range(_PERMUTATIONS))
    return measured, (1 + as_large) / (1 + _PERMUTATIONS)


def _spearman(first_N: np.ndarray, second_N: np.ndarray) -> float:
    return float(_unit_ranks(first_N) @ _unit_ranks(second_N))


def _unit_ranks(value_N: np.ndarray) -> np.ndarray:
    """Return centred ranks of unit length; zeros where all are equal."""
    from scipy.stats import rankdata

    rank_N = rankdata(value_N) - (len(value_N) + 1) / 2
    return rank_N / max(float(np.linalg.norm(rank_N)), 1e-12)
