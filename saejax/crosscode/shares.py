"""Which features of a crosscoder are one part's own: relative norms, then latent scaling beside shared features."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from saejax.causal.controls import nearest_features
from saejax.crosscode.norms import by_norms, relative_norms, shared
from saejax.crosscode.results import PartFeatures, PrivateFeature
from saejax.crosscode.scaling import block_sums, block_weights, latent_scaling
from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import part_norms
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.models.sites import OtherSite, parse_site, site_parts
from saejax.results import Interval
from saejax.tasks.scoring import middle

Blocks = Callable[[], Iterable[Sequence[np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a feature counts as private.

    Attributes:
      private: relative norm above which it seems to be.
      nu_error, nu_reconstruction: below which the upper ends of its shares must lie.
      most: features of each part that are measured, those that fire most often.
      resamples, seed: of the bootstrap.
    """

    private: float = 0.9
    nu_error: float = 0.2
    nu_reconstruction: float = 0.5
    most: int = 256
    resamples: int = 200
    seed: int = 789


@dataclasses.dataclass(frozen=True)
class Shares:
    """What is said of a crosscoder's features.

    Attributes:
      norm_PxF, relative_PxF: norms of the rows' parts, and relative ones.
      shared_F: alive features that are as long in both parts, bool.
      own, control, measured: as ``own``, ``control`` and ``listed`` of ``CrosscodedDictionary``.
    """

    norm_PxF: np.ndarray
    relative_PxF: np.ndarray
    shared_F: np.ndarray
    own: dict[str, PartFeatures]
    control: PartFeatures
    measured: list[PrivateFeature]

    def ordered(self, parts: Sequence[str]) -> "Shares":
        """The same with the parts in this order."""
        places = [list(self.own).index(part) for part in parts]
        own = {part: self.own[part] for part in parts}
        norm_PxF, relative_PxF = self.norm_PxF[places], self.relative_PxF[places]
        return dataclasses.replace(self, own=own, norm_PxF=norm_PxF, relative_PxF=relative_PxF)


def one_space(dictionary: Dictionary) -> bool:
    """Whether the parts are one site of two models of one width: then directions mean the same, as they were tuned."""
    sites = [parse_site(part) for part in site_parts(dictionary.config.site)]
    plain = {site.site if isinstance(site, OtherSite) else site for site in sites}
    return len(plain) == 1 and len(set(dictionary.config.widths)) == 1


def feature_shares(
    dictionary: Dictionary, statistics: FeatureStatistics, blocks: Blocks, count: int, limits: Limits
) -> Shares:
    """Which features are whose own.

    Args:
      dictionary: a crosscoder.
      statistics: of its features on the text.
      blocks: gives the blocks of the text each time it is called; see ``block_sums``.
      count: of blocks, an even number of at least 4.
      limits: when a feature counts as private.
    """
    parts = site_parts(dictionary.config.site)
    W_dec_FxD = np.asarray(dictionary.W_dec_FxD[...], np.float64)
    norm_PxF = part_norms(W_dec_FxD, dictionary.config.widths)
    relative_PxF = relative_norms(norm_PxF)
    part_F = np.where(statistics.fires_at_all_F, by_norms(relative_PxF, limits.private), -1)
    shared_F = shared(relative_PxF) & statistics.fires_at_all_F
    chosen: list[tuple[int, int]] = []
    for part in range(len(parts)):
        found = np.flatnonzero(part_F == part)
        most_often = found[np.argsort(-statistics.fires_F[found], kind="stable")][: limits.most]
        chosen += [(feature, part) for feature in most_often.tolist()]
    beside = [(f, int(relative_PxF[:, f].argmax())) for f in _matched(statistics, [f for f, _ in chosen], shared_F)]
    measured = _measured(dictionary, W_dec_FxD, [*chosen, *beside], statistics, blocks, count, limits, relative_PxF)
    own, controls = measured[: len(chosen)], measured[len(chosen) :]
    of_part = {
        name: _summary([one for one in own if one.part == name], int((part_F == part).sum()))
        for part, name in enumerate(parts)
    }
    order = sorted(own, key=lambda one: (-one.private, -one.firing_rate))
    return Shares(norm_PxF, relative_PxF, shared_F, of_part, _summary(controls, int(shared_F.sum())), order)


def _matched(statistics: FeatureStatistics, features: Sequence[int], shared_F: np.ndarray) -> list[int]:
    """As many shared features, if there are, that fire as often and as strongly: the nearest of each not yet taken."""
    among_F = shared_F.copy()
    among_F[np.asarray(features, np.int64)] = True
    only = dataclasses.replace(statistics, fires_F=np.where(among_F, statistics.fires_F, 0))
    taken: dict[int, None] = {}
    for row in nearest_features(only, features) if len(features) else ():
        taken.update(dict.fromkeys([f for f in row.tolist() if f not in taken][:1]))
    return list(taken)


def _measured(
    dictionary: Dictionary,
    W_dec_FxD: np.ndarray,
    chosen: Sequence[tuple[int, int]],
    statistics: FeatureStatistics,
    blocks: Blocks,
    count: int,
    limits: Limits,
    relative_PxF: np.ndarray,
) -> list[PrivateFeature]:
    if not chosen:
        return []
    parts, widths = site_parts(dictionary.config.site), dictionary.config.widths
    sums = block_sums(dictionary, [feature for feature, _ in chosen], blocks())
    weights_RxN, same = block_weights(count, limits.resamples, limits.seed), one_space(dictionary)
    found = []
    for place, (feature, part) in enumerate(chosen):
        scaling = latent_scaling(sums, place, W_dec_FxD[feature], part, widths, same, weights_RxN)
        error, reconstruction = _interval(scaling.error_R), _interval(scaling.reconstruction_R)
        found.append(
            PrivateFeature(
                feature,
                parts[part],
                float(relative_PxF[part, feature]),
                float(statistics.firing_rate_F[feature]),
                error,
                reconstruction,
                float(scaling.moved_R[0]) if np.isfinite(scaling.moved_R[0]) else None,
                private=error is not None
                and reconstruction is not None
                and error.high < limits.nu_error
                and reconstruction.high < limits.nu_reconstruction,
            )
        )
    return found


def _interval(value_R: np.ndarray) -> Interval | None:
    """The first, and the middle 95 % of the others; None unless all are finite."""
    if not np.isfinite(value_R).all():
        return None
    return middle(value_R[1:], float(value_R[0]))


def _summary(found: Sequence[PrivateFeature], by_norms: int) -> PartFeatures:
    def quantile(values: list[float | None], share: float) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.quantile(known, share)) if known else None

    return PartFeatures(
        by_norms=by_norms,
        measured=len(found),
        private=sum(one.private for one in found),
        nu_error=quantile([one.nu_error.mean for one in found if one.nu_error], 0.5),
        nu_reconstruction=quantile([one.nu_reconstruction.mean for one in found if one.nu_reconstruction], 0.5),
        nu_null=quantile([one.nu_null for one in found], 0.95),
    )
