"""The features of a study: the top ones by attribution, matched random ones, and what each is replaced with."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from saejax.causal.controls import disjoint_sets, draw_alike, match_ratios
from saejax.causal.results import RankedFeature
from saejax.causal.study.items import ItemScores
from saejax.causal.study.references import Reference, References
from saejax.causal.study.results import BenchmarkActivations, ChosenFeatures, ImportantFeature
from saejax.dictionaries import Dictionary
from saejax.evaluation.reconstruction import reconstruct
from saejax.interventions.slopes import leaders
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import Edit
from saejax.settings import StudyConfig
from saejax.tasks.benchmark_definitions import Item

_POOL = 256  # activations of a feature from which random replacements are drawn
_ADVICE = "lower --study.top or --study.matches, raise --study.items"


def choose_features(
    split: SplitModel,
    scores: ItemScores,
    train: Sequence[Item],
    test: Sequence[Item],
    config: StudyConfig,
    name: str,
    check_stop: Callable[[], None],
) -> tuple[ChosenFeatures, list[ImportantFeature]]:
    """The top features of a benchmark, their controls, and activations of both; and all that fire, ranked.

    Args:
      train: items that choose the features and lend activations.
      test: items on which controls are matched.
      name: of the benchmark; with ``config.seed`` it decides the draws.
      check_stop: called before each batch; may raise to stop.

    Returns:
      What is replaced; and every feature that fires on the test items, the largest attribution first.

    Raises:
      UserError: too few features fire for matched controls, or something is not finite.
    """

    def in_batches(references: Sequence[Reference]) -> References:
        return References(split, references, config.batch_tokens, check_stop)

    attribution_F = in_batches(scores.objectives(train)).attribution()
    top = leaders(attribution_F, config.top)
    statistics = in_batches(scores.solutions(test)).statistics()
    firing = statistics.firing(top)
    seed = [config.seed, *name.encode()]
    controls_NxC = draw_alike(statistics, firing, config.draws, config.matches, seed, _ADVICE)
    replaced = sorted({*top, *controls_NxC.ravel().tolist()})

    def ranked(feature: int) -> RankedFeature:
        return RankedFeature(feature, attribution=float(attribution_F[feature]), **statistics.of(feature))

    chosen = ChosenFeatures(
        top=tuple(map(ranked, top)),
        controls=tuple(map(tuple, controls_NxC.tolist())),
        match=match_ratios(statistics, firing, controls_NxC),
        disjoint=disjoint_sets(statistics, firing, config.matches),
        pools={
            int(feature): tuple(pool)
            for feature, pool in in_batches(scores.solutions(train)).pools(replaced, _POOL, config.seed).items()
        },
    )
    order_F = np.argsort(-attribution_F, kind="stable")
    live = [ranked(feature) for feature in order_F.tolist() if statistics.fires_F[feature]]
    return chosen, [ImportantFeature(**vars(feature)) for feature in live]


def measure_activations(
    split: SplitModel, references: Sequence[Reference], config: StudyConfig, check_stop: Callable[[], None]
) -> BenchmarkActivations:
    """What the activations of a benchmark's items are like, and how well the dictionary rebuilds them.

    Args:
      references: of the items, with their answers.
      check_stop: called before each batch; may raise to stop.

    Raises:
      UserError: something is not finite.
    """
    norms: list[np.ndarray] = []

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for read_NxD, value_NxD in References(split, references, config.batch_tokens, check_stop).values():
            norms.append(np.linalg.norm(value_NxD.astype(np.float64), axis=1))
            yield read_NxD, value_NxD

    (scores,) = reconstruct([split.dictionary], blocks(), split.point.mesh)
    norm_N = np.concatenate(norms)
    return BenchmarkActivations(
        tokens=scores.tokens,
        median_norm=float(np.median(norm_N)),
        largest_norm=float(norm_N.max()),
        l0=scores.l0,
        firing=1 - scores.dead_fraction,
        explained_variance=scores.explained_variance,
    )


def edits_of(
    dictionary: Dictionary,
    chosen: ChosenFeatures,
    condition: str,
    length: int,
    config: StudyConfig,
    texts: Sequence[int],
) -> list[Edit]:
    """The edit of a condition (``scores.conditions``); none if it has no features.

    Args:
      dictionary: whose features they are.
      chosen: from ``choose_features``.
      condition: its name.
      length: tokens of the longest text.
      texts: which item each text of a batch is of: every item has random replacements of its own.
    """
    which, replacement = condition.split("/")
    if which == "top":
        features: Sequence[int] = [entry.feature for entry in chosen.top]
    else:
        features = chosen.controls[int(which.removeprefix("control-"))]
    if not features:
        return []
    if replacement == "zero":
        return [dictionary.ablate(features)]
    pools = [chosen.pools[feature] for feature in features]
    return [dictionary.redraw(features, pools, length, config.seed, texts)]
