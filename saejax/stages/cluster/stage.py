"""The stage ``cluster``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.matching.clusters.results import ClusterResults
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
from saejax.stages.cluster.report import sections
from saejax.stages.cluster.run import run_cluster
from saejax.stages.cluster.settings import ClusterConfig
from saejax.stages.train.members import trained_sites
from saejax.tasks.settings import CorpusConfig, held_out_settings
from saejax.training.settings import TrainConfig


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings that are read; those of the corpus for dictionaries that no store has the text of."""
    read, corpus = counted(configs[ModelConfig], configs[ClusterConfig]), configs[CorpusConfig]
    return read | held_out_settings(corpus) | {"corpus.context": corpus.context}


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
    settings=_settings,
    inputs=_inputs,
    names=lambda configs: ("",) if configs[ClusterConfig].dictionaries else (),
    revision=8,  # nothing fires at sinks of a transcoder's target
    places=list_folders("cluster", "dictionaries"),
    processes="items",
    section=sections,
)
