"""Associations of features with labels of a benchmark's items: its categories, and whether the model answers rightly.

1. A feature's activation on an item is its largest one. Its association with a label is the correlation of this with
   having the label, on test items.
2. The largest correlation of all features and labels is compared with those where labels are permuted over items, which
   corrects for the number of tests (Westfall and Young, 1993).
3. The probe's answer for the same feature and label: a logistic regression on this feature alone, fitted to train
   items, judges test items by the area under the ROC curve, with a permutation test.
4. The causal answer: ablating the feature alone lowers the answers to items with the label more than those to others.

What is correlated need be neither readable on new items nor used, so the three answers stand beside each other.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from saejax.interventions.probing import ProbeTask, fit_probe
from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval, resampling_weights
from saejax.statistics.ranks import holm

LEVEL = 0.05  # of every answer, after correction
RIGHT = "answered rightly"  # the label of items that the model answers rightly
_PERMUTATIONS, _RESAMPLES, _LEAST = 999, 1000, 4  # fewer items with a label, or without it, are not tested


@dataclasses.dataclass(frozen=True)
class FeatureAssociation:
    """A feature's association with a label, with the probe's and the causal answer."""

    feature: int  #: its index
    label: str  #: a category, or "answered rightly"
    items: int  #: test items with the label
    correlation: Interval  #: of its largest activation on an item with having the label
    p_value: float  #: corrected for all features and labels
    associated: str  #: yes or no, from p
    auc: float | None  #: of a probe of this feature alone on test items; None where train items lack the label
    p_probe: float | None  #: of the AUC, corrected by Holm over the listed features and labels
    probe: str  #: whether the probe finds the label: yes, no or not tested
    causal_drop: Interval | None  #: drop on items with the label minus that on others, nats; None: not ablated alone
    causal: str  #: whether it is above zero: yes, no or not tested


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
    top: tuple[FeatureAssociation, ...]  #: of the tested features, each with the label it is most associated with


def item_activations(f_NxF, text_N: np.ndarray, items: int) -> np.ndarray:
    """Return the largest activation of each feature on each item, [P, F].

    Args:
      f_NxF: sparse activations of N tokens, at least 0.
      text_N: item of each token.
      items: how many.
    """
    coo, largest_PxF = f_NxF.tocoo(), np.zeros((items, f_NxF.shape[1]), np.float32)
    token_X, feature_X = coo.coords
    np.maximum.at(largest_PxF, (text_N[token_X], feature_X), coo.data)
    return largest_PxF


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
      train_labels: label -> whether each train item has it; labels that are not known there are missing.
      test_QxF: activations on test items.
      test_labels: label -> whether each test item has it.
      tested: features that are listed.
      drops: feature -> drop of each test item's log-likelihood when it alone is ablated, nats.
      seed: of permutations and bootstrap.
    """
    items = len(test_QxF)
    kept = {name: has_Q for name, has_Q in test_labels.items() if _LEAST <= has_Q.sum() <= items - _LEAST}
    live_F = (test_QxF > 0).sum(axis=0) >= _LEAST
    rng = np.random.default_rng(seed)
    if not kept or not live_F.any():
        return BenchmarkAssociations((), ())
    has_QxL = np.stack([*kept.values()], axis=1).astype(np.float64)
    unit_QxF, unit_QxL = _unit(np.where(live_F, test_QxF, 0.0).astype(np.float64)), _unit(has_QxL)
    seen_FxL = unit_QxF.T @ unit_QxL
    order_SxQ = np.stack([rng.permutation(items) for _ in range(_PERMUTATIONS)])
    shuffled = [np.abs(unit_QxF.T @ unit_QxL[order_Q]) for order_Q in order_SxQ]
    largest_S = np.array([each_FxL.max() for each_FxL in shuffled])
    cut = float(np.quantile(largest_S, 1 - LEVEL, method="higher"))
    labels = tuple(
        LabelAssociations(
            label=name,
            items=int(kept[name].sum()),
            features=int(live_F.sum()),
            associated=int((np.abs(seen_FxL[:, place]) > cut).sum()),
            shuffled=float(np.mean([(each_FxL[:, place] > cut).sum() for each_FxL in shuffled])),
        )
        for place, name in enumerate(kept)
    )
    weight_RxQ = resampling_weights(np.zeros(items), _RESAMPLES, seed)
    rows = []
    for feature in tested:
        place = int(seen_FxL[feature].argmax())
        name = list(kept)[place]
        p_value = (1 + int((largest_S >= abs(seen_FxL[feature, place]) - 1e-12).sum())) / (1 + _PERMUTATIONS)
        auc, p_probe = None, None
        if name in train_labels and 0 < train_labels[name].sum() < len(train_PxF):
            columns = train_PxF[:, [feature]], train_labels[name].astype(int)
            auc, p_probe = _probe(*columns, test_QxF[:, [feature]], kept[name].astype(int), rng)
        causal = _contrast(drops[feature], kept[name], weight_RxQ) if feature in drops else None
        rows.append(
            FeatureAssociation(
                feature=int(feature),
                label=name,
                items=int(kept[name].sum()),
                correlation=_correlation(test_QxF[:, feature], kept[name], weight_RxQ),
                p_value=p_value,
                associated="yes" if p_value <= LEVEL else "no",
                auc=auc,
                p_probe=p_probe,
                probe="not tested",
                causal_drop=causal,
                causal="not tested" if causal is None else "yes" if causal.low > 0 else "no",
            )
        )
    return BenchmarkAssociations(labels, _corrected(rows))


def _unit(x_QxC: np.ndarray) -> np.ndarray:
    centred_QxC = x_QxC - x_QxC.mean(axis=0)
    return centred_QxC / np.maximum(np.linalg.norm(centred_QxC, axis=0), 1e-12)


def _probe(
    train_Px1: np.ndarray, train_P: np.ndarray, test_Qx1: np.ndarray, test_Q: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the AUC of a probe of one feature on test items, and its permutation p-value."""
    answers = fit_probe(ProbeTask(train_Px1.astype(float), train_P, test_Qx1.astype(float), test_Q), None, 1.0)
    assert answers.score_M is not None
    # The AUC is Mann and Whitney's statistic, a sum of ranks, of which only the labels are permuted.
    rank_Q, count = rankdata(answers.score_M), int(test_Q.sum())
    order_SxQ = rng.permuted(np.tile(test_Q, (_PERMUTATIONS, 1)), axis=1)
    auc, *shuffled = (np.vstack([test_Q, order_SxQ]) @ rank_Q - count * (count + 1) / 2) / (
        count * (len(test_Q) - count)
    )
    return float(auc), (1 + int((np.array(shuffled) >= auc - 1e-12).sum())) / (1 + _PERMUTATIONS)


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
    """Return the mean drop of items with a label minus that of the others, with its bootstrap interval."""
    inside_RxQ, outside_RxQ = weight_RxQ * has_Q, weight_RxQ * ~has_Q
    difference_R = (inside_RxQ @ drop_Q) / np.maximum(inside_RxQ.sum(axis=1), 1e-12)
    difference_R -= (outside_RxQ @ drop_Q) / np.maximum(outside_RxQ.sum(axis=1), 1e-12)
    return Interval(float(drop_Q[has_Q].mean() - drop_Q[~has_Q].mean()), *percentile_interval(difference_R))


def _corrected(rows: Sequence[FeatureAssociation]) -> tuple[FeatureAssociation, ...]:
    """Return the rows with the probes' p-values after Holm's correction, and their answers."""
    p_values = [row.p_probe for row in rows if row.p_probe is not None]
    corrected = iter(holm(np.array(p_values)).tolist() if p_values else [])
    judged = []
    for row in rows:
        if row.p_probe is None:
            judged.append(row)
        else:
            p_probe = next(corrected)
            judged.append(dataclasses.replace(row, p_probe=p_probe, probe="yes" if p_probe <= LEVEL else "no"))
    return tuple(judged)
