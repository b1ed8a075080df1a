"""The stage ``cluster``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.matching.clusters.results import ClusterResults
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage, train_units
from saejax.stages import identities
from saejax.stages.cluster.report import sections
from saejax.stages.cluster.run import run_cluster
from saejax.stages.cluster.settings import ClusterConfig
from saejax.stages.train.members import trained_sites
from saejax.tasks.settings import CorpusConfig
from saejax.training.settings import TrainConfig


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """Return the units of the dictionaries, and of their store."""
    trained = train_units(*configs[ClusterConfig].dictionaries)
    stored = ("capture",) if trained and configs[TrainConfig].source == "store" else ()
    return (*stored, *trained)


CLUSTER = Stage(
    name="cluster",
    summary="groups features that fire together, if --cluster.dictionaries names any",
    run=run_cluster,
    results=ClusterResults,
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
    section=sections,
)
