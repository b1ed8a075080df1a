"""The stage ``transfer``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.dictionaries.names import is_folder, kind_and_member
from saejax.matching.transfer.results import TransferResults
from saejax.matching.transfer.settings import TransferConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
from saejax.stages.train.members import units_of_members
from saejax.stages.transfer.report import sections
from saejax.stages.transfer.run import refuse_one, run_transfer
from saejax.tasks.settings import CorpusConfig, held_out_settings


def _reads_text(config: TransferConfig) -> bool:
    return "activity" in config.measures or config.reconstruction


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings that are read; of the corpus where models read its text, how long its pieces are, too."""
    read, corpus = counted(configs[ModelConfig], configs[TransferConfig]), configs[CorpusConfig]
    text = held_out_settings(corpus) | {"corpus.context": corpus.context}
    return read | (text if _reads_text(configs[TransferConfig]) else {})


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    names = configs[TransferConfig].dictionaries
    text = dict(corpus=identities.corpus) if _reads_text(configs[TransferConfig]) else {}
    return inputs_of(
        configs,
        *train_units(*names),
        *identities.units_of_labels(configs, names),  # chains of features have their names
        model=identities.model,
        folders=identities.dictionaries("transfer"),
        **text,
    )


def _check(configs: Configs) -> None:
    """Raise a ``UserError`` for one trained dictionary, before it is trained."""
    name, *others = names = configs[TransferConfig].dictionaries
    if not others and not is_folder(name):
        kind, member = kind_and_member(name)
        members = units_of_members(configs, kind)
        refuse_one(names, 1 if member or len(members) == 1 else 2)


TRANSFER = Stage(
    name="transfer",
    summary="compares dictionaries of different layers, seeds, sizes and models, if --transfer.dictionaries names any",
    run=run_transfer,
    results=TransferResults,
    groups=(ModelConfig, CorpusConfig, TransferConfig),
    reads=("train", "interpret", "atlas"),
    follows=("ablate",),
    settings=_settings,
    inputs=_inputs,
    revision=6,  # nothing fires at sinks of a transcoder's target
    names=lambda configs: ("",) if configs[TransferConfig].dictionaries else (),
    check=_check,
    places=list_folders("transfer", "dictionaries"),
    processes="items",
    section=sections,
)
