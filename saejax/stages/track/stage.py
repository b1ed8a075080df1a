"""The stage ``track``."""

from collections.abc import Sequence
from pathlib import Path

from saejax.config import Configs
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.labels import LABELS
from saejax.dictionaries.names import folder_name, is_folder
from saejax.errors import UserError
from saejax.files import file_sha256, fingerprint
from saejax.matching.track.results import TrackResults
from saejax.matching.track.settings import TrackConfig
from saejax.matching.track.texts import name_text, read_problems
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, split_unit, train_units
from saejax.stages import identities
from saejax.stages.interpret.settings import InterpretConfig
from saejax.stages.track.report import sections
from saejax.stages.track.run import run_track


def _names(configs: Configs) -> Sequence[str]:
    """Return the unit of the texts that are followed; none if there are none."""
    config = configs[TrackConfig]
    if config.prompt and config.prompts:
        raise UserError("--track.prompt and --track.prompts: expected one of them")
    if not config.prompt and not config.prompts:
        return ()
    if not config.dictionaries:
        raise UserError("--track.dictionaries is missing: name dictionaries of some layers, such as a stack's topk")
    return (folder_name(Path(config.prompts).name.split(".")[0]) if config.prompts else name_text(config.prompt),)


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return what is read, descriptions of the dictionaries' features where this run makes them."""
    units = train_units(*configs[TrackConfig].dictionaries)
    tracked = {split_unit(unit)[0] for unit in units}
    labelled = [f"interpret/{kind}" for kind in configs[InterpretConfig].dictionaries if f"train/{kind}" in tracked]
    shown = [unit.replace("interpret", "atlas", 1) for unit in labelled]
    return inputs_of(configs, *units, *labelled, *shown, model=identities.model, track=_files)


def _files(configs: Configs) -> str:
    """Return the hash of the files that flags name: texts, dictionaries and their labels."""
    config = configs[TrackConfig]
    folders = [Path(name) for name in config.dictionaries if is_folder(name) and Path(name).is_dir()]
    labels = [path for folder in folders for path in sorted(folder.parent.parent.glob(f"*/{folder.name}/**/{LABELS}"))]
    files = [*(Path(name) for name in (config.prompts, config.lens) if name), *labels]
    marks = [file_sha256(path) for path in files if path.is_file()]  # what is missing is said when it runs
    return fingerprint([*marks, *(hash_dictionaries(str(folder)) for folder in folders)])


def _check(configs: Configs) -> None:
    """Check the file of prompts before any model is loaded."""
    if configs[TrackConfig].prompts:
        read_problems(configs[TrackConfig])


TRACK = Stage(
    name="track",
    summary="follows prompts and worked solutions through the layers that have dictionaries, if --track.prompt or "
    "--track.prompts is set",
    run=run_track,
    results=TrackResults,
    groups=(ModelConfig, TrackConfig),
    reads=("train", "interpret", "atlas"),
    inputs=_inputs,
    names=_names,
    revision=14,  # an answer is followed in the solution, not in the prompt
    processes="items",
    check=_check,
    section=sections,
)
