"""Associations of features with labels of a benchmark's items: its categories, and whether the model answers rightly.

1. A feature's activation on an item is the one of largest size. Its association with a label is the correlation of this
   with having the label, on test items.
2. The largest correlation of all features and labels is compared with those where labels are permuted over items, which
   corrects for the number of tests (Westfall and Young, 1993). All answers are about more activation with the label:
   a feature that is less active there goes with other labels.
3. The label of a tested feature is the one that it is most correlated with on train items. What follows judges it on
   test items, which had no part in the choice. Whether the model answers rightly is known of test items alone.
4. The probe's answer for this feature and label: a logistic regression on this feature alone, fitted to train items,
   judges test items by the area under the ROC curve, with a permutation test.
5. The causal answer: ablating the feature alone lowers the answers to items with the label more than those to others.
   Labels are permuted over items; the statistic is Welch's t, for which the spread of both kinds may differ.

Of a feature that is silent on nearly all test items, or goes with no label on train items, nothing can be told, and
neither where even the smallest p-value that the items and permutations allow is above the level after correction: the
p-value that it would have if the items with the label were those on which it is most active, or whose drop is largest.
Such answers are not testable.

What is correlated need be neither readable on new items nor used, so the three answers stand beside each other.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.interventions.probing import ProbeTask, fit_probe
from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval, resampling_weights
from saejax.statistics.permutation import label_correlations
from saejax.statistics.ranks import holm_by_key

LEVEL = 0.05  # of all answers of a kind together: correlations of all features and labels, all probes, all drops
RIGHT = "answered rightly"  # the label of items that the model answers rightly
_UNTESTABLE = "not testable"
_PERMUTATIONS, _RESAMPLES, _LEAST = 999, 1000, 4  # fewer items with a label, or without it, are not tested


@dataclasses.dataclass(frozen=True)
class FeatureAssociation:
    """A feature's association with a label, with the probe's and the causal answer."""

    feature: int  #: its index
    label: str  #: the category that it is most correlated with on train items
    items: int  #: test items with the label
    correlation: Interval  #: of its activation of largest size on an item with having the label, on test items
    p_value: float  #: corrected for all features and labels
    associated: str  #: from p: yes, no or not testable
    auc: float  #: of a probe of this feature alone on test items
    p_probe: float  #: of the AUC, corrected by Holm over the listed features
    probe: str  #: whether the probe finds the label: yes, no or not testable
    causal_drop: Interval | None  #: drop on items with the label minus that on others, nats; None: not ablated alone
    p_causal: float | None  #: of a difference above zero, corrected by Holm over the listed features
    causal: str  #: whether it is above zero, from p: yes, no, not testable or not tested


@dataclasses.dataclass(frozen=True)
class LabelAssociations:
    """Number of features associated with a label."""

    label: str  #: a category, or "answered rightly"
    items: int  #: test items with the label
    features: int  #: that fire on at least 4 test items
    associated: int  #: of them, after correction
    shuffled: float  #: associated with permuted labels, mean over permutations


@dataclasses.dataclass(frozen=True)
class BenchmarkAssociations:
    """Associations of features with the labels of a benchmark's items."""

    labels: tuple[LabelAssociations, ...]  #: by label
    #: of the tested features, each with one label; none where train items have no label
    top: tuple[FeatureAssociation, ...]


def item_activations(f_NxF, text_N: np.ndarray, items: int) -> np.ndarray:
    """Return the activation of largest size of each feature on each item, [P, F].

    Args:
      f_NxF: sparse activations of N tokens; linear dictionaries' may be below 0.
      text_N: item of each token.
      items: how many.
    """
    coo, (high_PxF, low_PxF) = f_NxF.tocoo(), np.zeros((2, items, f_NxF.shape[1]), np.float32)
    token_X, feature_X = coo.coords
    for function, extreme_PxF in ((np.maximum, high_PxF), (np.minimum, low_PxF)):
        function.at(extreme_PxF, (text_N[token_X], feature_X), coo.data)
    return np.where(-low_PxF > high_PxF, low_PxF, high_PxF)


def associate(
    train_PxF: np.ndarray,
    train_labels: Mapping[str, np.ndarray],
    test_QxF: np.ndarray,
    test_labels: Mapping[str, np.ndarray],
    tested: Sequence[int],
    drops: Mapping[int, np.ndarray],
    seed: int,
) -> BenchmarkAssociations:
    """Return the associations of all features, and the three answers for the tested ones.

    Args:
      train_PxF: activation of each feature on each train item.
      train_labels: label -> whether each train item has it; labels that are not known there are missing, and are not
        those of tested features.
      test_QxF: activations on test items.
      test_labels: label -> whether each test item has it.
      tested: features that are listed.
      drops: feature -> drop of each test item's log-likelihood when it alone is ablated, nats.
      seed: of permutations and bootstrap.
    """
    items = len(test_QxF)
    kept = {name: has_Q for name, has_Q in test_labels.items() if _LEAST <= has_Q.sum() <= items - _LEAST}
    live_F = (test_QxF != 0).sum(axis=0) >= _LEAST
    rng = np.random.default_rng(seed)
    if not kept or not live_F.any():
        return BenchmarkAssociations((), ())
    has_QxL = np.stack([*kept.values()], axis=1).astype(np.float64)
    live_QxF = np.where(live_F, test_QxF, 0.0)
    order_SxQ = np.stack([rng.permutation(items) for _ in range(_PERMUTATIONS)])
    seen_FxL, largest_S = label_correlations(live_QxF, has_QxL, order_SxQ)
    cut = float(np.quantile(largest_S, 1 - LEVEL, method="higher"))
    # The few whose largest exceeds the cut are made again: no other has any association.
    shuffled = [label_correlations(live_QxF, has_QxL[order_Q])[0] for order_Q in order_SxQ[largest_S > cut]]
    exceeding = [(r_FxL > cut).sum(axis=0) for r_FxL in shuffled]
    shuffled_L = np.sum([np.zeros(len(kept)), *exceeding], axis=0) / _PERMUTATIONS
    labels = tuple(
        LabelAssociations(
            label=name,
            items=int(kept[name].sum()),
            features=int(live_F.sum()),
            associated=int((seen_FxL[:, place] > cut).sum()),
            shuffled=float(shuffled_L[place]),
        )
        for place, name in enumerate(kept)
    )
    weight_RxQ = resampling_weights(np.zeros(items), _RESAMPLES, seed)
    names = [name for name in kept if name in train_labels and 0 < train_labels[name].sum() < len(train_PxF)]
    if not names:
        return BenchmarkAssociations(labels, ())
    has_PxC = np.stack([train_labels[name] for name in names], axis=1).astype(np.float64)
    trained_FxC, _ = label_correlations(train_PxF, has_PxC)
    associations, least = [], []
    for feature in tested:
        name = names[int(trained_FxC[feature].argmax())]
        goes_with = trained_FxC[feature].max() > 1e-9  # or it has no label: silent on the questions of train items
        seen = seen_FxL[feature, list(kept).index(name)]
        best, _ = label_correlations(test_QxF[:, [feature]], _top(test_QxF[:, feature], kept[name])[:, None])
        p_value, p_best = (
            (1 + int((largest_S >= value - 1e-12).sum())) / (1 + _PERMUTATIONS) for value in (seen, float(best[0, 0]))
        )
        columns = train_PxF[:, [feature]], train_labels[name].astype(int)
        auc, p_probe, least_probe = _probe(*columns, test_QxF[:, [feature]], kept[name].astype(int), rng)
        drop_Q, p_causal, least_causal = drops.get(feature), None, 1.0
        if drop_Q is not None:
            p_causal, least_causal = contrast_p(drop_Q, kept[name], order_SxQ)
        least.append((least_probe, least_causal))
        associations.append(
            FeatureAssociation(
                feature=int(feature),
                label=name,
                items=int(kept[name].sum()),
                correlation=_correlation(test_QxF[:, feature], kept[name], weight_RxQ),
                p_value=p_value,
                associated=_answer(p_value) if goes_with and live_F[feature] and p_best <= LEVEL else _UNTESTABLE,
                auc=auc,
                p_probe=p_probe,
                probe="no" if goes_with and np.ptp(test_QxF[:, feature]) else _UNTESTABLE,
                causal_drop=None if drop_Q is None else _contrast(drop_Q, kept[name], weight_RxQ),
                p_causal=p_causal,
                causal="not tested" if drop_Q is None else "no" if goes_with and np.ptp(drop_Q) else _UNTESTABLE,
            )
        )
    return BenchmarkAssociations(labels, _corrected(associations, least, items))


def _top(value_Q: np.ndarray, has_Q: np.ndarray) -> np.ndarray:
    """Return the items of largest value, as many as have a label."""
    is_top_Q = np.zeros(len(value_Q), bool)
    is_top_Q[np.argsort(-value_Q, kind="stable")[: has_Q.sum()]] = True
    return is_top_Q


def _answer(p_value: float) -> str:
    return "yes" if p_value <= LEVEL else "no"


def _probe(
    train_Px1: np.ndarray, train_P: np.ndarray, test_Qx1: np.ndarray, test_Q: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the AUC of a probe of one feature on test items, its permutation p-value and the smallest possible."""
    from scipy.stats import rankdata

    answers = fit_probe(ProbeTask(train_Px1.astype(float), train_P, test_Qx1.astype(float), test_Q), None, 1.0)
    assert answers.score_M is not None
    # The AUC is Mann and Whitney's statistic, a sum of ranks, of which only the labels are permuted.
    rank_Q, count = rankdata(answers.score_M), int(test_Q.sum())
    order_SxQ = rng.permuted(np.tile(test_Q, (_PERMUTATIONS, 1)), axis=1)
    auc, best, *shuffled = (np.vstack([test_Q, _top(rank_Q, test_Q), order_SxQ]) @ rank_Q - count * (count + 1) / 2) / (
        count * (len(test_Q) - count)
    )
    p_value, least = (
        (1 + int((np.array(shuffled) >= value - 1e-12).sum())) / (1 + _PERMUTATIONS) for value in (auc, best)
    )
    return float(auc), p_value, least


def _correlation(value_Q: np.ndarray, has_Q: np.ndarray, weight_RxQ: np.ndarray) -> Interval:
    """Return the correlation of a number with a label, with its bootstrap interval."""
    value_Q, has_Q = value_Q.astype(np.float64), has_Q.astype(np.float64)

    def of(weights: np.ndarray) -> np.ndarray:
        mean, share = weights @ value_Q, weights @ has_Q
        both = weights @ (value_Q * has_Q) - mean * share
        spread = (weights @ value_Q**2 - mean**2) * (share - share**2)
        return both / np.sqrt(np.maximum(spread, 1e-24))

    seen = float(of(np.full((1, len(value_Q)), 1 / len(value_Q)))[0])
    return Interval(seen, *percentile_interval(np.clip(of(weight_RxQ), -1, 1)))


def _contrast(drop_Q: np.ndarray, has_Q: np.ndarray, weight_RxQ: np.ndarray) -> Interval:
    """Return the mean drop of items with a label minus the others' mean, with its bootstrap interval."""
    inside_RxQ, outside_RxQ = weight_RxQ * has_Q, weight_RxQ * ~has_Q
    difference_R = (inside_RxQ @ drop_Q) / np.maximum(inside_RxQ.sum(axis=1), 1e-12)
    difference_R -= (outside_RxQ @ drop_Q) / np.maximum(outside_RxQ.sum(axis=1), 1e-12)
    return Interval(float(drop_Q[has_Q].mean() - drop_Q[~has_Q].mean()), *percentile_interval(difference_R))


def contrast_p(drop_Q: np.ndarray, has_Q: np.ndarray, order_SxQ: np.ndarray) -> tuple[float, float]:
    """Return the p-value of a larger mean drop of items with a label than of others, and the smallest possible one.

    By permutations; the statistic is Welch's t (Janssen, 1997): with it the level holds where the spreads differ, as
    far as that of Welch's test does.

    Args:
      drop_Q: drop of each item.
      has_Q: whether each item has the label; at least 2 do, and 2 do not.
      order_SxQ: permutations of the items.
    """

    def of(inside_SxQ: np.ndarray) -> np.ndarray:
        means, errors = [], []
        for weight_SxQ in (inside_SxQ, ~inside_SxQ):
            count_S = weight_SxQ.sum(axis=1)
            mean_S = weight_SxQ @ drop_Q / count_S
            means.append(mean_S)
            errors.append((weight_SxQ * (drop_Q[None] - mean_S[:, None]) ** 2).sum(axis=1) / (count_S - 1) / count_S)
        return (means[0] - means[1]) / np.sqrt(np.maximum(sum(errors), 1e-24))

    seen, top, *shuffled = of(np.concatenate([has_Q[None], _top(drop_Q, has_Q)[None], has_Q[order_SxQ]]))
    # The items of largest drop have nearly the largest t.
    values = seen, max(seen, top, *shuffled)
    p_value, least = ((1 + int((np.array(shuffled) >= value - 1e-9).sum())) / (1 + len(order_SxQ)) for value in values)
    return p_value, least


def _corrected(
    associations: Sequence[FeatureAssociation], least: Sequence[tuple[float, float]], items: int
) -> tuple[FeatureAssociation, ...]:
    """Return the associations with p-values after Holm's correction, of probes and of drops, and their answers.

    Args:
      associations: one for each tested feature; questions that are not testable, or were not tested, say so.
      least: the smallest p-values that its probe and its drops could have, before correction.
      items: number of test items.
    """
    probe = holm_by_key({place: association.p_probe for place, association in enumerate(associations)})
    causal = holm_by_key(
        {
            place: association.p_causal
            for place, association in enumerate(associations)
            if association.p_causal is not None
        }
    )

    def answer(association: FeatureAssociation, earlier: str, p_value: float | None, tests: int, best: float) -> str:
        """Return the answer to a question with so many tests, if there is none yet."""
        if earlier != "no" or p_value is None:
            return earlier
        # Even labels that fit perfectly have this p-value: as few ways there are to give them to the items.
        if tests * max(1 / (1 + _PERMUTATIONS), 1 / math.comb(items, association.items)) > LEVEL:
            return _UNTESTABLE
        return "yes" if p_value <= LEVEL else _UNTESTABLE if tests * best > LEVEL else "no"

    return tuple(
        dataclasses.replace(
            association,
            p_probe=probe[place],
            probe=answer(association, association.probe, probe[place], len(probe), least[place][0]),
            p_causal=causal.get(place),
            causal=answer(association, association.causal, causal.get(place), len(causal), least[place][1]),
        )
        for place, association in enumerate(associations)
    )
