"""Do two models find the same features important for a benchmark? Features are matched by their activity on its items.

1. Both models read the same items; their tokens are paired where they end at the same character.
2. Two features are a pair if the assignment with the largest sum of their activations' correlations over these tokens
   (``match``) joins them with one of at least ``LEAST``. The same with one text shifted by half is what chance gives.
3. The statistic is Spearman's correlation of the importance of paired features (attribution for the right answers),
   with a permutation p-value: in how many permutations it is as many standard errors above 0. What fires strongly has
   large attributions of either sign in both models; the correlation itself would be larger there than in permutations
   even where the signs are unrelated (DiCiccio and Romano, "Robust permutation tests for correlation and
   regression coefficients", 2017).
4. Two placebos: pairs with a rotated dictionary of the second model, and the importance in one model against that for
   corrupted answers in the other. What is important for any answer makes both agree, the right one or not.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.matching.match import match as match_rows
from saejax.matching.rows import CentredRows
from saejax.matching.transfer.activity import MIN_FIRINGS, Activity, ReadText, aligned, encode, read_text, site_values
from saejax.models.language_model import LanguageModel
from saejax.parallel.mesh import make_mesh

LEAST = 0.5  # correlation of the activations of a pair
PLACEBO_QUANTILE = 0.95
_BATCH_TOKENS = 2048
_PERMUTATIONS, _PAIRS = 9999, 8  # fewer pairs have no rank correlation to speak of
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
class FeatureMatch:
    """The features of two models that are matched by their activity on the same items."""

    first_M: np.ndarray  #: matched features of the first
    second_M: np.ndarray  #: their partners in the second
    live: tuple[int, int]  #: number of features of each model that fire often enough to have a partner
    chance: int  #: number of pairs where one text is shifted by half

    def back(self) -> "FeatureMatch":
        """Return the match of the second model with the first."""
        return FeatureMatch(self.second_M, self.first_M, self.live[::-1], self.chance)

    @functools.cached_property
    def partner(self) -> dict[int, int]:
        """Partner of each matched feature of the first model."""
        return dict(zip(self.first_M.tolist(), self.second_M.tolist(), strict=True))

    @property
    def shared(self) -> float:
        """Share of the first model's live features that have a partner."""
        return len(self.first_M) / max(self.live[0], 1)

    @property
    def shared_null(self) -> float:
        """The same by chance."""
        return self.chance / max(self.live[0], 1)


@dataclasses.dataclass(frozen=True)
class ImportanceAlignment:
    """Agreement of two models on which features matter."""

    correlation: float | None  #: rank correlation of importance over pairs; None with fewer than 8 pairs
    p_value: float | None  #: share of permutations in which it is as many standard errors above 0; above 0
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
    read = read_text(lm.tokenizer, list(texts.values()), lm.config.context, lm.bos)
    sites = dictionary.site, dictionary.config.target or dictionary.site
    values = site_values(lm, read, [*dict.fromkeys(sites)], _BATCH_TOKENS)
    x_NxD, y_NxO = (values[site] for site in sites)
    activity = encode(dictionary.with_sink_norms(lm.sink_norm), x_NxD, _BATCH_TOKENS, y_NxO)
    return ItemFeatures(tuple(texts), activity, read.text_N, read.end_N, importance_F, placebo_RxF)


def align_importance(
    first: ItemFeatures, second: ItemFeatures, match: FeatureMatch, rotated: ItemFeatures | None = None, seed: int = 789
) -> ImportanceAlignment:
    """Return the agreement of two models on which features matter for the same items.

    Args:
      first: features of a model.
      second: features of another model.
      match: their match.
      rotated: features of a rotated dictionary of the second model.
      seed: seed of the permutations.
    """
    first_M, second_M = first.importance_F[match.first_M], second.importance_F[match.second_M]
    correlation, p_value, rotated_correlation, values = None, None, None, list[float]()
    if len(first_M) >= _PAIRS:
        correlation, p_value = rank_correlation(first_M, second_M, seed)
    if correlation is not None:
        # Either model may be the one whose importance is for corrupted answers: both directions are placebos.
        values = [_spearman(first_M, placebo_F[match.second_M]) for placebo_F in second.placebo_RxF]
        values += [_spearman(placebo_F[match.first_M], second_M) for placebo_F in first.placebo_RxF]
    if rotated is not None:
        rows, _ = _shared_rows(first, rotated)
        first_R, rotated_R = correlated_pairs(*rows)
        if len(first_R) >= _PAIRS:
            rotated_correlation = _spearman(first.importance_F[first_R], rotated.importance_F[rotated_R])
    return ImportanceAlignment(
        correlation=correlation,
        p_value=p_value,
        rotated=rotated_correlation,
        placebo=float(np.quantile(values, PLACEBO_QUANTILE, method="higher")) if values else None,
    )


def match_features(first: ItemFeatures, second: ItemFeatures) -> FeatureMatch | None:
    """Return the match of two models' features by their activity; None where they read other items.

    Args:
      first: features of a model.
      second: features of another model.
    """
    if first.ids != second.ids:
        return None
    rows, live = _shared_rows(first, second)
    shifted_rows, _ = _shared_rows(first, second, shift=True)
    return FeatureMatch(*correlated_pairs(*rows), live, len(correlated_pairs(*shifted_rows)[0]))


def _shared_rows(
    first: ItemFeatures, second: ItemFeatures, shift: bool = False
) -> tuple[tuple[CentredRows, CentredRows], tuple[int, int]]:
    """Return the activity of two models' features on the tokens that both read, and how many of each fire often enough.

    Args:
      first: features of a model.
      second: features of another model on the same items.
      shift: pair each token with that half the text further on: what chance gives.
    """
    first_N, second_N = aligned(first.read, second.read)
    real_N = first.activity.real_N[first_N] & second.activity.real_N[second_N]
    first_N, second_N = first_N[real_N], second_N[real_N]
    if shift:
        # Half the text away: runs of firings keep their form, and no pair of tokens stays a pair.
        second_N = np.roll(second_N, len(second_N) // 2)
    first_F, second_G = first.activity.firings(first_N) >= MIN_FIRINGS, second.activity.firings(second_N) >= MIN_FIRINGS
    rows = first.activity.rows(first_N, first_F), second.activity.rows(second_N, second_G)
    return rows, (int(first_F.sum()), int(second_G.sum()))


def correlated_pairs(first: CentredRows, second: CentredRows) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of an assignment of two dictionaries' rows whose product is at least ``LEAST``.

    Returns:
      The rows of the first, rising, and their partners in the second.
    """
    ((_, matched),) = match_rows([("", first, second)], make_mesh())
    first_M = np.flatnonzero(np.nan_to_num(matched.value_F, nan=-1.0) >= LEAST)
    return first_M, matched.partner_F[first_M]


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
    rng = np.random.default_rng(seed)

    def standard_errors(one_N: np.ndarray) -> float:
        product_N = one_N * two_N
        return float(product_N.sum() / max(float(np.linalg.norm(product_N)), 1e-12))

    # A tolerance, because sums of the same products in another order differ in their last digits.
    least = standard_errors(one_N) - 1e-9
    as_large = sum(standard_errors(rng.permutation(one_N)) >= least for _ in range(_PERMUTATIONS))
    return float(one_N @ two_N), (1 + as_large) / (1 + _PERMUTATIONS)


def _spearman(first_N: np.ndarray, second_N: np.ndarray) -> float:
    return float(_unit_ranks(first_N) @ _unit_ranks(second_N))


def _unit_ranks(value_N: np.ndarray) -> np.ndarray:
    """Return centred ranks of unit length; zeros where all are equal."""
    from scipy.stats import rankdata

    rank_N = rankdata(value_N) - (len(value_N) + 1) / 2
    return rank_N / max(float(np.linalg.norm(rank_N)), 1e-12)
