"""The stage ``cluster``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage, train_units
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, MeshConfig, ModelConfig, TrainConfig, shared
from saejax.stages.train import trained_sites
from saejax.tasks import identities


@dataclasses.dataclass(frozen=True)
class ClusterConfig(Config):
    """Groups of features that fire together."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "dictionaries whose features to group: kinds trained here with all members of their stacks (topk), members "
        "(topk/seed5), or folders; empty: none",
    )
    tokens: int = setting(32768, "approximate number of tokens of the text on which firings are compared", low=64)
    batch_tokens: int = shared.analysis_batch_tokens()
    seed: int = shared.analysis_seed()


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """Return the units of the dictionaries, and of their store."""
    trained = train_units(*configs[ClusterConfig].dictionaries)
    stored = ("capture",) if trained and configs[TrainConfig].source == "store" else ()
    return (*stored, *trained)


def _run(run: Run) -> Any:
    from saejax.matching.clusters.run import run_cluster

    return run_cluster(run)


def _results() -> Any:
    from saejax.matching.clusters.results import ClusterResults

    return ClusterResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.matching.clusters.report import sections

    return sections(findings, draw)


CLUSTER = Stage(
    name="cluster",
    summary="groups features that fire together, if --cluster.dictionaries names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, CorpusConfig, ClusterConfig),
    placement=(MeshConfig,),
    reads=("capture", "train"),
    follows=("interpret", "atlas"),
    needs=_needs,
    inputs=trained_sites,
    names=lambda configs: ("",) if configs[ClusterConfig].dictionaries else (),
    identity=dict(
        model=identities.model,
        corpus=identities.corpus,
        folders=lambda configs: identities.dictionaries(configs, "cluster"),
    ),
    revision=4,  # groups by co-activation alone
    processes="items",
    section=_sections,
)
