"""The stage ``cluster``: groups of similar features of a dictionary, in two views of them (``groups``).

A dictionary is a part of the run. Every feature of every group is in ``<part>-groups.parquet``.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.interpret.feature_record import feature_names
from saejax.interventions.columns import Columns
from saejax.matching.clusters.groups import DISSOLVED, StableGroups, View, coactivation, decoder, find_groups
from saejax.matching.clusters.results import ClusteredDictionary, ClusterResults, FeatureGroup, Grouping
from saejax.matching.transfer.activity import Activity, encode
from saejax.matching.transfer.compared import Compared, load_compared
from saejax.matching.transfer.reading import SharedText, read_shared_text
from saejax.parallel.mesh import make_mesh
from saejax.runner.parts import Measure, Measured, OnProgress, each_part, part_file
from saejax.runner.stage import folder_name
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.cluster import ClusterConfig

_FLAG = "--cluster.dictionaries"
_LISTED = 20  # groups of a view in the results
_RULE = (
    "A group is stable if its largest Jaccard overlap with a group found on a bootstrap sample, mean over samples, is "
    f"above {DISSOLVED:g} and above that of every group of shuffled data"
)
_SMALLEST = 5  # features of the smallest group: two or three often fire together by chance
_MOST = 8192  # features that are grouped, whose similarities take 256 MB; more are sampled from those that fire
_RESAMPLES = 10  # bootstrap samples, and shuffled data sets


class ClusterText:
    """The text of the stage ``cluster``."""

    def __init__(self, run: Run, compared: Sequence[Compared]):
        self._config = run.configs[ClusterConfig]
        self._store = Store.open(run.inputs["capture"]) if "capture" in run.inputs else None
        self._unstored = [each for each in compared if not self._is_stored(each)]
        settings = self._config.tokens, self._config.batch_tokens, self._config.seed
        self._shared: SharedText | None = None
        if self._unstored:
            self._shared = read_shared_text(run, self._unstored, make_mesh(run.configs[MeshConfig]), *settings)

    def _is_stored(self, each: Compared) -> bool:
        if not self._store or self._store.model.fingerprint != each.fingerprint:
            return False
        return each.config.site in self._store.sites

    def of(self, each: Compared) -> tuple[Activity, np.ndarray]:
        """Return the activity of a dictionary, and the document of each token."""
        if not self._is_stored(each):
            assert self._shared
            return self._shared.activity(self._unstored.index(each)), self._shared.reads[each.fingerprint].text_N
        assert self._store
        dictionary = each.dictionary.with_sink_norms(self._store.max_norm)
        rows = self._store.rows("train", dictionary.site)
        document_N = self._store.tokens(rows)[0]
        documents, index_N, count = np.unique(document_N, return_inverse=True, return_counts=True)
        # Whole documents at random, as documents are what the bootstrap resamples.
        order = np.random.default_rng(self._config.seed).permutation(len(documents))
        taken = np.zeros(len(documents), bool)
        taken[order[: int(np.searchsorted(np.cumsum(count[order]), self._config.tokens)) + 1]] = True
        kept_N = taken[index_N]
        values_NxD = np.asarray(self._store.read(dictionary.site, rows[kept_N]), np.float32)
        return encode(dictionary, values_NxD, self._config.batch_tokens), document_N[kept_N]


@dataclasses.dataclass(frozen=True)
class GroupedFeatures(Columns):
    """The grouped features, a row for each feature and view."""

    view: np.ndarray  #: name of the view
    group: np.ndarray  #: number of the group; -1: none
    feature: np.ndarray  #: index of the feature
    centrality: np.ndarray  #: mean similarity to the others of its group; NaN where there is none


def run_cluster(run: Run) -> ClusterResults:
    """Group the features of ``--cluster.dictionaries``; dictionaries finished in an earlier run are kept.

    Raises:
      UserError: dictionaries or text are missing.
      Interrupted: asked to stop.
    """
    compared = load_compared(run.configs[ClusterConfig].dictionaries, run.inputs, _FLAG)
    parts = [f"{number:03d}-{folder_name(each.name)}" for number, each in enumerate(compared)]

    def begin() -> Measure:
        text = ClusterText(run, compared)
        return lambda part, on_progress: _measure(run, compared[parts.index(part)], text, part, on_progress)

    results = each_part(run, parts, begin, ClusteredDictionary, "groupings")
    return ClusterResults(_RULE, tuple(results[part] for part in parts))


def _measure(run: Run, compared: Compared, text: ClusterText, part: str, on_progress: OnProgress) -> Measured:
    """Group the features of a dictionary in every view."""
    config, features = run.configs[ClusterConfig], compared.config.n_features
    view_by_name, without, tokens = _make_views(compared, text, config.seed)
    total, done = len(view_by_name) * (1 + 3 * _RESAMPLES), 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    names = feature_names(*compared.trained_in(run.folder.parent))
    groupings: list[Grouping] = []
    tables: list[GroupedFeatures] = []
    for number, (name, view) in enumerate(view_by_name.items()):
        groups, similarity_FxF = find_groups(view, _SMALLEST, _RESAMPLES, [config.seed, number], step)
        centrality_F = _centrality(groups.group_F, similarity_FxF)
        groupings.append(_describe(name, view, groups, centrality_F, names))
        view_F = np.full(len(view.feature_F), name)
        tables.append(GroupedFeatures(view_F, groups.group_F, view.feature_F, centrality_F))
    empty = GroupedFeatures(*(np.zeros(0, kind) for kind in ("U1", int, int, float)))
    columns = [table.columns for table in (empty, *tables)]
    whole = GroupedFeatures(**{name: np.concatenate([part[name] for part in columns]) for name in empty.columns})
    whole.save(part_file(run, part, "-groups.parquet"))
    results = ClusteredDictionary(compared.name, compared.config.site, features, tokens, tuple(groupings), without)
    return Measured(results, _line(results))


def _make_views(compared: Compared, text: ClusterText, seed: int) -> tuple[dict[str, View], dict[str, str], int]:
    """Return the views of a dictionary's features, the skipped ones with the reason, and the tokens of the text."""
    activity, text_N = text.of(compared)
    view_by_name = dict(
        coactivation=coactivation(activity, text_N),
        decoder=decoder(np.asarray(compared.dictionary.W_dec_FxD[...], np.float32), activity),
    )
    without = {}
    for name in [name for name, view in view_by_name.items() if len(view.feature_F) < 2]:
        without[name] = f"only {len(view_by_name.pop(name).feature_F)} features fire often enough"
    rng = np.random.default_rng(seed)
    return {name: view.among(_MOST, rng) for name, view in view_by_name.items()}, without, int(activity.real_N.sum())


def _centrality(group_F: np.ndarray, similarity_FxF: np.ndarray) -> np.ndarray:
    """Return the mean similarity of each feature to the others of its group; NaN without a group."""
    centrality_F = np.full(len(group_F), np.nan)
    for group in range(int(group_F.max(initial=-1)) + 1):
        members = np.flatnonzero(group_F == group)
        inside = similarity_FxF[np.ix_(members, members)]
        if len(members) > 1:
            centrality_F[members] = (inside.sum(axis=1) - inside.diagonal()) / (len(members) - 1)
    return centrality_F


def _describe(
    name: str, view: View, groups: StableGroups, centrality_F: np.ndarray, names: Mapping[int, str]
) -> Grouping:
    """Return the results of a view."""
    described = []
    for group, overlap in enumerate(groups.overlap_U.tolist()):
        members = np.flatnonzero(groups.group_F == group)
        # The most typical features first: a group is named after the first that has a name.
        members = members[np.argsort(-centrality_F[members], kind="stable")]
        features = tuple(view.feature_F[members].tolist())
        group_name = next((names[feature] for feature in features if feature in names), f"feature {features[0]}")
        similarity = float(np.nan_to_num(centrality_F[members]).mean())
        described.append(FeatureGroup(group_name, features, similarity, overlap, overlap > groups.bar))
    described.sort(key=lambda group: (-group.stable, -len(group.features), -group.overlap))
    return Grouping(
        view=name,
        features=len(view.feature_F),
        grouped=int((groups.group_F >= 0).sum()),
        count=len(described),
        stable_groups=sum(group.stable for group in described),
        bar=groups.bar,
        count_null=groups.null_groups,
        largest=tuple(described[:_LISTED]),
    )


def _line(results: ClusteredDictionary) -> str:
    """Return the figures of a dictionary as a log line."""
    if not results.groupings:
        return f"{results.name}: nothing to group: {'; '.join(results.without.values())}"
    figures = [
        f"{each.view}: {each.stable_groups} of {each.count} groups stable (overlap above {each.bar:.2f})"
        for each in results.groupings
    ]
    return f"{results.name}: {'; '.join(figures)}"
