"""The stage ``cluster``: which features of a dictionary belong together, in three views of them (``views``).

A dictionary is a part in the sense of ``parts``. Every feature of every group is in ``<part>-groups.parquet``.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.clusters import primitives, views
from saejax.clusters.agreement import GroupedFeatures, between_dictionaries, between_views
from saejax.clusters.groups import DISSOLVED, Grouped, find, methods
from saejax.clusters.primitives import BehaviourEffects
from saejax.clusters.results import ClusteredDictionary, ClusterResults, FeatureGroup, Grouping
from saejax.clusters.text import ClusterText
from saejax.clusters.views import View
from saejax.interventions.answers import AblateResults
from saejax.results import Interval, load_results
from saejax.runner.parts import Measure, Measured, OnProgress, each_part, part_file
from saejax.runner.stage import folder_name
from saejax.runner.workspace import Run
from saejax.stages.cluster import ClusterConfig
from saejax.transfer.compared import Compared, load_compared

_FLAG = "--cluster.dictionaries"
_LISTED = 20  # groups of a grouping in the results
_RULE = (
    "A grouping is stable if it agrees more (adjusted Rand index) with what is found on every bootstrap sample than "
    "any grouping of shuffled data agrees with one of a sample of them; of its groups, those are stable whose largest "
    f"overlap (Jaccard) with a group of a sample is above {DISSOLVED:g} in the mean, and above what 95 % of the groups "
    "of shuffled data reach"
)


def run_cluster(run: Run) -> ClusterResults:
    """Groups the features of ``--cluster.dictionaries``, those left from an earlier run excepted.

    Raises:
      UserError: dictionaries, text or effects are missing.
      Interrupted: asked to stop.
    """
    compared = load_compared(run.configs[ClusterConfig].dictionaries, run.inputs, _FLAG)
    parts = [f"{place:03d}-{folder_name(one.name)}" for place, one in enumerate(compared)]

    def begin() -> Measure:
        text = ClusterText(run, compared)
        return lambda part, on_progress: _measure(run, compared[parts.index(part)], text, part, on_progress)

    found = each_part(run, parts, begin, ClusteredDictionary, "groupings")
    tables = [GroupedFeatures.load(part_file(run, part, "-groups.parquet")) for part in parts]
    between = between_dictionaries(compared, tables, run.configs[ClusterConfig].seed)
    return ClusterResults(_RULE, tuple(found[part] for part in parts), between)


def _measure(run: Run, one: Compared, text: ClusterText, part: str, on_progress: OnProgress) -> Measured:
    """Groups the features of a dictionary in every view."""
    config = run.configs[ClusterConfig]
    behaviours = _effects(run, one)
    found, without, tokens = _views(one, text, behaviours, config.seed, config.most)
    total, done = len(found) * (1 + 3 * config.resamples), 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    by, labels = methods(config.smallest, config.groups), one.labels(run.folder.parent)
    groupings: dict[tuple[str, str], Grouping] = {}
    tables: list[GroupedFeatures] = []
    for number, (name, view) in enumerate(found.items()):
        grouped, alike_FxF = find(view, by, config.resamples, [config.seed, number], step)
        for method, own in grouped.items():
            central_F = _centrality(own.group_F, alike_FxF)
            groupings[name, method] = _grouping((name, method), view, own, central_F, labels)
            view_F, method_F = (np.full(len(view.feature_F), word) for word in (name, method))
            tables.append(GroupedFeatures(view_F, method_F, own.group_F, view.feature_F, central_F))
    whole = GroupedFeatures.together(tables)
    whole.save(part_file(run, part, "-groups.parquet"))
    told = _with_costs(list(groupings.values()), behaviours, one.dictionary.config.n_features, config.seed)
    views_of = between_views(list(found), list(by), whole, config.seed)
    dictionary = one.dictionary
    results = ClusteredDictionary(
        one.name, dictionary.site, dictionary.config.n_features, tokens, tuple(told), without, views_of
    )
    return Measured(results, _line(results))


def _effects(run: Run, one: Compared) -> dict[str, BehaviourEffects]:
    """What removing features of a dictionary costs each behaviour, where that was measured."""
    for unit, folder in run.inputs.items():
        results = load_results(folder) if unit.startswith("ablate/") else None
        if isinstance(results, AblateResults) and results.dictionary == one.name:
            return {name: BehaviourEffects.load(folder, name) for name in results.importance or {}}
    return {}


def _views(
    one: Compared, text: ClusterText, behaviours: Mapping[str, BehaviourEffects], seed: int, most: int
) -> tuple[dict[str, View], dict[str, str], int]:
    """The views of a dictionary's features; those that there are not, with the reason; tokens of the text."""
    activity, text_N = text.of(one)
    made = dict(
        coactivation=views.coactivation(activity, text_N),
        decoder=views.decoder(np.asarray(one.dictionary.W_dec_FxD[...], np.float32), activity),
    )
    without = {}
    if behaviours:
        made["effects"] = views.effects(*primitives.profiles(behaviours))
    else:
        without["effects"] = "effects of all features were not measured (--ablate.effects=all)"
    for name in [name for name, view in made.items() if len(view.feature_F) < 2]:
        without[name] = f"{len(made.pop(name).feature_F)} features are seen often enough"
    rng = np.random.default_rng(seed)
    return {name: view.among(most, rng) for name, view in made.items()}, without, int(activity.real_N.sum())


def _centrality(group_F: np.ndarray, alike_FxF: np.ndarray) -> np.ndarray:
    """How alike each feature is to the others of its group, mean; NaN where there is none."""
    found_F = np.full(len(group_F), np.nan)
    for group in range(int(group_F.max(initial=-1)) + 1):
        own = np.flatnonzero(group_F == group)
        inside = alike_FxF[np.ix_(own, own)]
        if len(own) > 1:
            found_F[own] = (inside.sum(axis=1) - inside.diagonal()) / (len(own) - 1)
    return found_F


def _grouping(
    of: tuple[str, str], view: View, own: Grouped, central_F: np.ndarray, labels: Mapping[int, str]
) -> Grouping:
    groups = []
    for group, overlap in enumerate(own.overlap_U.tolist()):
        members = np.flatnonzero(own.group_F == group)
        members = members[np.argsort(-central_F[members], kind="stable")]
        features = tuple(view.feature_F[members].tolist())
        name = next((labels[feature] for feature in features if feature in labels), f"feature {features[0]}")
        stable, alike = own.stable and overlap > own.bar, float(np.nan_to_num(central_F[members]).mean())
        groups.append(FeatureGroup(name, features, alike, overlap, stable, {}, ()))
    groups.sort(key=lambda group: (-group.stable, -len(group.features), -group.overlap))
    return Grouping(
        *of,
        features=len(view.feature_F),
        grouped=int((own.group_F >= 0).sum()),
        count=len(groups),
        agreement=_range(own.agreement_R),
        agreement_null=_range(own.null_agreement_R),
        count_null=float(own.null_groups_R.mean()),
        stable=own.stable,
        stable_groups=sum(group.stable for group in groups),
        largest=tuple(groups),
    )


def _range(values_R: np.ndarray) -> Interval:
    return Interval(float(values_R.mean()), float(values_R.min()), float(values_R.max()))


def _with_costs(
    groupings: Sequence[Grouping], behaviours: Mapping[str, BehaviourEffects], features: int, seed: int
) -> list[Grouping]:
    """With what stable groups cost behaviours; no more groups than are listed."""
    stable = [(place, group) for place, one in enumerate(groupings) for group in one.largest if group.stable]
    found = primitives.costs([group.features for _, group in stable], behaviours, features, seed)
    told: list[list[FeatureGroup]] = [[] for _ in groupings]
    for (place, group), costs in zip(stable, found, strict=True):
        told[place].append(dataclasses.replace(group, costs=costs, primitives=primitives.primitives(costs)))
    kept = []
    for one, own in zip(groupings, told, strict=True):
        own.sort(key=lambda group: -len(group.primitives))  # the others stay in their order
        largest = (*own, *(group for group in one.largest if not group.stable))
        kept.append(dataclasses.replace(one, largest=largest[:_LISTED]))
    return kept


def _line(results: ClusteredDictionary) -> str:
    """The figures of a dictionary in a line."""
    if not results.groupings:
        return f"{results.name}: nothing to group: {'; '.join(results.without.values())}"
    told = [
        f"{one.view}, {one.method}: {one.stable_groups} of {one.count} groups stable, adjusted Rand index "
        f"{one.agreement.mean:.2f} (shuffled {one.agreement_null.mean:.2f})"
        for one in results.groupings
    ]
    return f"{results.name}: {'; '.join(told)}"
