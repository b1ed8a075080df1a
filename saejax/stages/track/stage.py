"""The stage ``track``."""

from collections.abc import Sequence
from pathlib import Path

from saejax.config import Configs
from saejax.dictionaries.formats.place import is_address
from saejax.dictionaries.names import folder_name
from saejax.errors import UserError
from saejax.files import fingerprint
from saejax.matching.track.results import TrackResults
from saejax.matching.track.settings import TrackConfig
from saejax.matching.track.texts import name_text, read_problems
from saejax.models.identity import content_sha256
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
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
    file = Path(config.prompts).name.removesuffix(".jsonl")
    return (folder_name(file) if file else name_text(config.prompt),)


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return what is read, descriptions of the dictionaries' features where this run makes them."""
    names = configs[TrackConfig].dictionaries
    units = *train_units(*names), *identities.units_of_labels(configs, names)
    return inputs_of(configs, *units, model=identities.model, track=_files)


def _files(configs: Configs) -> str:
    """Return the hash of the files that flags name: texts, dictionaries and their labels."""
    config = configs[TrackConfig]
    files = [Path(name) for name in (config.prompts, config.lens) if name]
    # A lens has gigabytes. What is missing is said before.
    marks = [content_sha256(path) for path in files if path.is_file()]
    return fingerprint([*marks, *identities.hash_folders(config.dictionaries)])


def _places(configs: Configs) -> dict[str, Sequence[str]]:
    lens = configs[TrackConfig].lens
    return {**_dictionaries(configs), "track.lens": [lens] if lens and not is_address(lens) else []}


def _check(configs: Configs) -> None:
    """Check the file of prompts before any model is loaded."""
    if configs[TrackConfig].prompts:
        read_problems(configs[TrackConfig])


_dictionaries = list_folders("track", "dictionaries")

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
    revision=18,  # links of negative activations
    processes="items",
    check=_check,
    places=_places,
    section=sections,
)
