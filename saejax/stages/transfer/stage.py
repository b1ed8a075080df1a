"""The stage ``transfer``."""

from saejax.config import Configs
from saejax.matching.transfer.results import TransferResults
from saejax.matching.transfer.settings import TransferConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, train_units
from saejax.stages import identities
from saejax.stages.transfer.report import sections
from saejax.stages.transfer.run import run_transfer
from saejax.tasks.settings import CorpusConfig


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    names = configs[TransferConfig].dictionaries
    return inputs_of(
        configs,
        *train_units(*names),
        *identities.units_of_labels(configs, names),  # chains of features have their names
        model=identities.model,
        corpus=identities.corpus,
        folders=identities.dictionaries("transfer"),
    )


TRANSFER = Stage(
    name="transfer",
    summary="compares dictionaries of different layers, seeds, sizes and models, if --transfer.dictionaries names any",
    run=run_transfer,
    results=TransferResults,
    groups=(ModelConfig, CorpusConfig, TransferConfig),
    reads=("train", "interpret", "atlas"),
    follows=("ablate",),
    inputs=_inputs,
    revision=5,  # firing rates and labels are of the compared dictionary, whatever DIR/evaluate stands for
    names=lambda configs: ("",) if configs[TransferConfig].dictionaries else (),
    processes="items",
    section=sections,
)
