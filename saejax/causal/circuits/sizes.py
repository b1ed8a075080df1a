"""How much of a behaviour circuits of more and more features keep: the scores of MIB, for features.

Let m(C) be the mean logit difference with only the features C kept, all others that fire on the test prompts removed
(what the dictionary does not explain stays), m(M) that of the model and m(0) that without any of them. The
*faithfulness* of a circuit is

    f(C) = (m(C) - m(0)) / (m(M) - m(0)).

Features are put in an order on train prompts, and the first 0.1, 0.2, 0.5, 1, 2, 5, ..., 100 % of those that fire are
kept. Over the share k of them (a linear axis, trapezoids between sizes, from the smallest on)

    CPR = integral of f dk        from an order by signed attribution: how much the best circuits do, higher is better;
    CMD = integral of |f - 1| dk  from an order by its size: how close circuits are to the model, lower is better

(Mueller et al., 2025, arXiv 2504.13151). f may exceed 1, so that CPR rewards leaving out what hurts. Since the axis is
linear, circuits of more than a fifth of the features make up most of either score.

Beside them stand random orders, and the order by how active features are, which asks no gradient. What differs from the
paper: units are the features of one dictionary at one site, so that scores compare with each other and not with its
tables.
"""

from collections.abc import Sequence

import numpy as np

from saejax.causal.ablate.verdict import spread_over
from saejax.causal.circuits.results import CircuitScore, CircuitSizes
from saejax.causal.claims import randomisation_p
from saejax.causal.clustered import Resampling
from saejax.causal.experiment import Experiment
from saejax.results import Interval
from saejax.settings import AblateConfig
from saejax.tasks.scoring import middle

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DRAWS = 20  # random orders
_ORDERS = ("signed", "size", "activity")


def measure_sizes(experiment: Experiment, attribution_F: np.ndarray, config: AblateConfig) -> CircuitSizes | None:
    """Keeps growing circuits of a dictionary's features.

    Args:
      attribution_F: of every feature, on the train prompts.
      config: of the stage; its ``seed``, ``bootstrap`` and ``draw_prompts`` are used.

    Returns:
      None where no feature fires.
    """
    statistics = experiment.statistics()
    firing_N = np.flatnonzero(statistics.fires_at_all_F)
    if not len(firing_N):
        return None
    rng = np.random.default_rng([config.seed, len(firing_N)])
    keys = attribution_F[firing_N], np.abs(attribution_F[firing_N]), statistics.sum_F[firing_N]
    orders = {name: firing_N[np.argsort(-key, kind="stable")] for name, key in zip(_ORDERS, keys, strict=True)}
    sizes = np.unique(np.ceil(np.array(SHARES) * len(firing_N)).astype(int))
    chosen_Q = spread_over(experiment.templates, config.draw_prompts)
    random = [rng.permutation(firing_N) for _ in range(DRAWS)]
    kept, drawn = _kept(experiment, list(orders.values()), sizes), _kept(experiment, random, sizes, chosen_Q.tolist())
    none_P, all_P = kept[0, 0], kept[0, -1]
    over = Resampling.of(experiment.templates, config.bootstrap, config.seed)
    if over.mean(all_P - none_P).low <= 0:
        return CircuitSizes(len(firing_N), (), {}, {}, "removing all features does not clearly cost the behaviour")
    share_S = sizes / len(firing_N)
    return CircuitSizes(
        features=len(firing_N),
        sizes=tuple(sizes.tolist()),
        faithfulness={
            name: tuple(faithfulness(own.mean(axis=1)).tolist()) for name, own in zip(orders, kept, strict=True)
        },
        scores={
            score: _score(kept, drawn, chosen_Q, order, score, share_S, over)
            for score, order in (("cpr", "signed"), ("cmd", "size"))
        },
        reason=None,
    )


def _kept(
    experiment: Experiment, orders: Sequence[np.ndarray], sizes: np.ndarray, prompts: Sequence[int] | None = None
) -> np.ndarray:
    """Logit differences with nothing and with the first so many features of each order kept, [E, 1 + S, P]."""
    sets = [order[size:].tolist() for order in orders for size in (0, *sizes)]
    distinct = {tuple(sorted(one)): number for number, one in enumerate(sets)}
    places = {key: place for place, key in enumerate(distinct)}
    left_UxP = experiment.ablate([list(key) for key in distinct], prompts).ablated_SxP
    return left_UxP[[places[tuple(sorted(one))] for one in sets]].reshape(len(orders), 1 + len(sizes), -1)


def faithfulness(score_xS: np.ndarray) -> np.ndarray:
    """f of growing circuits, from their mean scores; the first is that of none, the last that of all, [..., S]."""
    none, every = score_xS[..., :1], score_xS[..., -1:]
    return (score_xS - none)[..., 1:] / (every - none)


def area(faithfulness_xS: np.ndarray, share_S: np.ndarray, score: str) -> np.ndarray:
    """The score "cpr" or "cmd" of faithfulness at each rising share of the features, [...]."""
    height_xS = faithfulness_xS if score == "cpr" else np.abs(faithfulness_xS - 1)
    return np.trapezoid(height_xS, share_S, axis=-1)


def _interval(score_XxP: np.ndarray, share_S: np.ndarray, score: str, over: Resampling) -> Interval:
    """The area and its 95 % bootstrap interval: prompts are drawn before the ratio is taken."""
    areas = area(faithfulness(over.share_RxP @ score_XxP.T), share_S, score)
    return middle(areas, float(area(faithfulness(score_XxP.mean(axis=1)), share_S, score)))


def _score(
    kept_ExXxP: np.ndarray,
    drawn_NxXxQ: np.ndarray,
    chosen_Q: np.ndarray,
    order: str,
    score: str,
    share_S: np.ndarray,
    over: Resampling,
) -> CircuitScore:
    """A score of one order, beside that of activity and, on the prompts of the draws, those of random orders."""
    own_XxP, active_XxP = (kept_ExXxP[_ORDERS.index(name)] for name in (order, "activity"))
    every = np.concatenate([own_XxP[None][:, :, chosen_Q], drawn_NxXxQ]).mean(axis=2)
    areas = area(faithfulness(every), share_S, score)
    return CircuitScore(
        own=_interval(own_XxP, share_S, score, over),
        activity=_interval(active_XxP, share_S, score, over),
        random=middle(areas[1:]),
        p_value=float(randomisation_p(areas if score == "cpr" else -areas)[0]),
    )
