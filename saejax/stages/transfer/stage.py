"""The stage ``transfer``."""

from saejax.matching.transfer.results import TransferResults
from saejax.matching.transfer.settings import TransferConfig
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage, train_units
from saejax.stages import identities
from saejax.stages.transfer.report import sections
from saejax.stages.transfer.run import run_transfer
from saejax.tasks.settings import CorpusConfig

TRANSFER = Stage(
    name="transfer",
    summary="compares dictionaries of different layers, seeds, sizes and models, if --transfer.dictionaries names any",
    run=run_transfer,
    results=TransferResults,
    groups=(ModelConfig, CorpusConfig, TransferConfig),
    placement=(MeshConfig,),
    reads=("train",),
    follows=("ablate", "interpret", "atlas"),
    needs=lambda configs, name: train_units(*configs[TransferConfig].dictionaries),
    revision=4,  # without dead features, also before evaluate has run
    names=lambda configs: ("",) if configs[TransferConfig].dictionaries else (),
    identity=dict(
        model=identities.model,
        corpus=identities.corpus,
        folders=lambda configs: identities.dictionaries(configs, "transfer"),
    ),
    processes="items",
    section=sections,
)
