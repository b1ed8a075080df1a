"""Every top feature of a benchmark removed by itself, and so is every one of the matched random features.

A feature's *drop* on an item is what the reference answer loses of its log-likelihood per token. Over items it has a
bootstrap interval, a sign-flip p-value and, over the top features, a q-value. A draw of matched features is a set like
the top ones: how many of its features have as small a q-value, over that draw, says how many of any features would; and
each top feature stands beside those that draws put in its place.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import false_discovery_control

from saejax.causal.claims import randomisation_p
from saejax.causal.statistics import least_p, sign_flip_p
from saejax.causal.study.results import SingleEffect, SingleEffects
from saejax.settings import StudyConfig
from saejax.tasks.scoring import bootstrap_mean

DISCOVERY = 0.05  # largest q-value of a discovery
_PERMUTATIONS = 20_000


def judge_single(
    top: Sequence[int],
    features: Sequence[int],
    controls_DxC: np.ndarray,
    drop_KxN: np.ndarray,
    lost_KxN: np.ndarray | None,
    config: StudyConfig,
) -> SingleEffects:
    """What drops say of the top features.

    Args:
      top: C of them, in the order of the draws' columns.
      features: the K that were removed, rising: all of the top ones and of the draws.
      controls_DxC: the draws.
      drop_KxN: by how much each one's removal lowers each item's score, in nats per token.
      lost_KxN: by how much it lowers accuracy; None where it was not measured.
    """
    p_K = sign_flip_p(drop_KxN, _PERMUTATIONS, config.seed)
    place = {feature: k for k, feature in enumerate(features)}
    sets_SxC = np.vectorize(place.__getitem__)(np.concatenate([[top], controls_DxC]))  # the first is that of the top
    q_SxC = false_discovery_control(p_K[sets_SxC], axis=1)
    found_S = (q_SxC <= DISCOVERY).sum(axis=1)

    def one(column: int) -> SingleEffect:
        own, others_J = sets_SxC[0, column], np.setdiff1d(sets_SxC[1:, column], sets_SxC[0, column])
        drop_K = drop_KxN.mean(axis=1)
        lost = None if lost_KxN is None else bootstrap_mean(lost_KxN[own], config.bootstrap, config.seed)
        return SingleEffect(
            feature=top[column],
            drop=bootstrap_mean(drop_KxN[own], config.bootstrap, config.seed),
            p_value=float(p_K[own]),
            q_value=float(q_SxC[0, column]),
            controls=len(others_J),
            control_drop=float(drop_K[others_J].mean()) if len(others_J) else None,
            control_percentile=float((drop_K[others_J] < drop_K[own]).mean()) if len(others_J) else None,
            accuracy_drop=lost,
            control_accuracy_drop=float(lost_KxN[others_J].mean()) if lost_KxN is not None and len(others_J) else None,
        )

    effects = sorted(map(one, range(len(top))), key=lambda effect: -effect.drop.mean)
    return SingleEffects(
        features=tuple(effects),
        discoveries=int(found_S[0]),
        control_discoveries=tuple(found_S[1:].tolist()),
        p_value=float(randomisation_p(found_S.astype(np.float64))[0]),
        least_p=least_p(drop_KxN.shape[1], _PERMUTATIONS),
    )


def line(single: SingleEffects) -> str:
    """The figures in a line of text."""
    drawn = single.control_discoveries
    return (
        f"by themselves {single.discoveries} of {len(single.features)} top features that fire change the reference's "
        f"log-likelihood (q <= {DISCOVERY:g}), of as many matched random ones {sum(drawn) / len(drawn):.1f} on average "
        f"(p = {single.p_value:.2g})"
    )
