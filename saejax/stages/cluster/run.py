"""The stage ``cluster``: groups of a dictionary's features that fire together (``groups``).

A dictionary is a part of the run. Every feature of every group is in ``<part>-groups.parquet``.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries.names import folder_name
from saejax.interpret.firings import used_rows
from saejax.interventions.columns import Columns
from saejax.matching.clusters.groups import DISSOLVED, Coactivation, StableGroups, find_groups
from saejax.matching.clusters.results import ClusteredDictionary, ClusterResults, FeatureGroup
from saejax.matching.transfer.activity import Activity, encode
from saejax.matching.transfer.compared import Compared
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.progress import OnProgress
from saejax.runner.parts import Measure, Measured, each_part, part_file
from saejax.runner.workspace import Run
from saejax.stages.cluster.settings import ClusterConfig
from saejax.stages.transfer.inputs import find_names, load_compared, read_run_text

_FLAG = "--cluster.dictionaries"
_LISTED = 20  # groups of a dictionary in the results
_RULE = (
    "A group is stable if its largest Jaccard overlap with a group found on a bootstrap sample, mean over samples, is "
    f"above {DISSOLVED:g} and above that of every group of shuffled data"
)
_SMALLEST = 5  # features of the smallest group: two or three often fire together by chance
_MOST = 8192  # features that are grouped, whose similarities take 256 MB; more are sampled from features that fire
_RESAMPLES = 10  # bootstrap samples, and shuffled data sets

ActivityOf = Callable[[Compared], tuple[Activity, np.ndarray]]


def open_texts(run: Run, compared: Sequence[Compared]) -> ActivityOf:
    """Return the function that gives the activity of a dictionary, and the text of each token.

    The text is the store's for a dictionary whose sites it has; for others a model reads held-out text.
    """
    config = run.configs[ClusterConfig]
    store = Store.open(run.inputs["capture"]) if "capture" in run.inputs else None
    # With a transcoder's target, whose attention sinks are left out, too.
    stored = [
        entry.name
        for entry in compared
        if store
        and store.model.fingerprint == entry.fingerprint
        and {entry.config.site, entry.target} <= {*store.sites}
    ]
    others = [entry for entry in compared if entry.name not in stored]
    settings = make_mesh(run.configs[MeshConfig]), config.tokens, config.batch_tokens, config.seed
    shared = read_run_text(run, others, *settings) if others else None

    def activity_of(entry: Compared) -> tuple[Activity, np.ndarray]:
        if entry.name not in stored:
            assert shared
            return shared.activity(others.index(entry)), shared.reads[entry.model_key].text_N
        assert store
        dictionary = entry.load(settings[0]).with_sink_norms(store.max_norm)
        rows = used_rows(store, "train", dictionary.site, entry.target)
        piece_N, position_N, _ = store.tokens(rows)
        text_N, start_N = (store.documents.column(name)[piece_N] for name in ("source", "start"))
        # As in the text: shuffled data shift runs of firings, and rows of a shard are in random order.
        order_N = np.lexsort((position_N, start_N, text_N))
        rows, piece_N, text_N = rows[order_N], piece_N[order_N], text_N[order_N]
        pieces, index_N, count = np.unique(piece_N, return_inverse=True, return_counts=True)
        # Pieces at random, as a text may be longer than all that is wanted.
        order = np.random.default_rng(config.seed).permutation(len(pieces))
        taken = np.zeros(len(pieces), bool)
        taken[order[: int(np.searchsorted(np.cumsum(count[order]), config.tokens)) + 1]] = True
        kept_N = taken[index_N]
        values_MxD = np.asarray(store.read(dictionary.site, rows[kept_N]), np.float32)
        return encode(dictionary, values_MxD, config.batch_tokens), text_N[kept_N]

    return activity_of


@dataclasses.dataclass(frozen=True)
class GroupedFeatures(Columns):
    """The features of a dictionary that were looked at."""

    group: np.ndarray  #: number of the group; -1: none
    feature: np.ndarray  #: index of the feature


def run_cluster(run: Run) -> ClusterResults:
    """Group the features of ``--cluster.dictionaries``; dictionaries finished in an earlier run are kept.

    Raises:
      UserError: dictionaries are missing, or text is: whole texts are resampled, of which there have to be a few.
      Interrupted: asked to stop.
    """
    compared = load_compared(run.configs[ClusterConfig].dictionaries, run.inputs, _FLAG)
    parts = [f"{number:03d}-{folder_name(entry.name)}" for number, entry in enumerate(compared)]

    def begin() -> Measure:
        activity_of = open_texts(run, compared)
        return lambda part, on_progress: _measure(run, compared[parts.index(part)], activity_of, part, on_progress)

    results = each_part(run, parts, begin, ClusteredDictionary, "groupings")
    return ClusterResults(_RULE, tuple(results[part] for part in parts))


def _measure(run: Run, compared: Compared, activity_of: ActivityOf, part: str, on_progress: OnProgress) -> Measured:
    """Group the features of a dictionary."""
    config, steps = run.configs[ClusterConfig], itertools.count(1)
    activity, text_N = activity_of(compared)
    firings = Coactivation.of(activity, text_N).among(_MOST, np.random.default_rng(config.seed))
    groups, similarity_FxF = find_groups(
        firings, _SMALLEST, _RESAMPLES, [config.seed, 0], lambda: on_progress(next(steps), 1 + 3 * _RESAMPLES)
    )
    GroupedFeatures(groups.group_F, firings.feature_F).save(part_file(run, part, "-groups.parquet"))
    described = _describe(firings.feature_F, groups, similarity_FxF, find_names(compared, run))
    results = ClusteredDictionary(
        name=compared.name,
        site=compared.config.site,
        tokens=int(activity.real_N.sum()),
        features=len(firings.feature_F),
        grouped=int((groups.group_F >= 0).sum()),
        count=len(described),
        stable_groups=sum(group.stable for group in described),
        bar=groups.bar,
        count_null=groups.null_groups,
        largest=tuple(described[:_LISTED]),
    )
    return Measured(
        results,
        f"{results.name}: {results.stable_groups} of {results.count} groups of {results.features:,} features are "
        f"stable (overlap above {results.bar:.2f})",
    )


def _describe(
    feature_F: np.ndarray, groups: StableGroups, similarity_FxF: np.ndarray, names: Mapping[int, str]
) -> list[FeatureGroup]:
    """Return the groups, stable ones first, by size.

    Args:
      feature_F: index of each feature.
      groups: groups of the features.
      similarity_FxF: similarity of the features.
      names: names of features, by index.
    """
    described = []
    for group, overlap in enumerate(groups.overlap_U.tolist()):
        members = np.flatnonzero(groups.group_F == group)
        inside_MxM = similarity_FxF[np.ix_(members, members)]
        centrality_M = (inside_MxM.sum(axis=1) - inside_MxM.diagonal()) / (len(members) - 1)
        # The most typical features first: a group is named after the first that has a name.
        features = tuple(feature_F[members[np.argsort(-centrality_M, kind="stable")]].tolist())
        group_name = next((names[feature] for feature in features if feature in names), f"feature {features[0]}")
        described.append(FeatureGroup(group_name, features, float(centrality_M.mean()), overlap, overlap > groups.bar))
    return sorted(described, key=lambda group: (-group.stable, -len(group.features), -group.overlap))
