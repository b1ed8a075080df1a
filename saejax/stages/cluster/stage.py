"""The stage ``cluster``."""

from saejax.config import Configs
from saejax.matching.clusters.results import ClusterResults
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, train_units
from saejax.stages import identities
from saejax.stages.cluster.report import sections
from saejax.stages.cluster.run import run_cluster
from saejax.stages.cluster.settings import ClusterConfig
from saejax.stages.train.members import trained_sites
from saejax.tasks.settings import CorpusConfig
from saejax.training.settings import TrainConfig


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    names = configs[ClusterConfig].dictionaries
    trained = train_units(*names)
    stored = ("capture",) if trained and configs[TrainConfig].source == "store" else ()
    return inputs_of(
        trained_sites(configs),
        *stored,
        *trained,
        *identities.units_of_labels(configs, names),
        model=identities.model,
        corpus=identities.corpus,
        folders=identities.dictionaries("cluster"),
    )


CLUSTER = Stage(
    name="cluster",
    summary="groups features that fire together, if --cluster.dictionaries names any",
    run=run_cluster,
    results=ClusterResults,
    groups=(ModelConfig, CorpusConfig, ClusterConfig),
    reads=("capture", "train", "interpret", "atlas"),
    inputs=_inputs,
    names=lambda configs: ("",) if configs[ClusterConfig].dictionaries else (),
    revision=7,  # labels are of the grouped dictionary
    processes="items",
    section=sections,
)
