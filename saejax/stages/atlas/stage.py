"""The stage ``atlas``."""

from pathlib import Path

from saejax.config import Configs
from saejax.dictionaries.labels import COLUMNS, read_sheet
from saejax.dictionaries.names import folder_name
from saejax.errors import Faults, UserError
from saejax.interpret.labels import label_files
from saejax.interpret.results import AtlasResults
from saejax.interventions.settings import AblateConfig
from saejax.models.identity import content_sha256
from saejax.runner.registry import all_stages
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages.atlas.run import run_atlas
from saejax.stages.atlas.settings import AtlasConfig
from saejax.stages.interpret.report import links
from saejax.stages.interpret.settings import InterpretConfig
from saejax.stages.interpret.stage import _names
from saejax.tasks.settings import TaskConfig


def _labels(configs: Configs) -> str:
    """Return the hash of the files of labels; "" without any."""
    files = [file for some in label_files(Path(configs[AtlasConfig].labels or "-")) for file in some]
    return "-".join(content_sha256(file) for file in files if file.is_file())  # what is missing is said before


def _several(configs: Configs) -> str:
    """Return whether labels have to name their dictionary, because several kinds are shown; "" without labels."""
    return str(len(configs[InterpretConfig].dictionaries) > 1) if configs[AtlasConfig].labels else ""


def _check(configs: Configs) -> None:
    """Read the files of labels as far as that takes no dictionary."""
    path = configs[AtlasConfig].labels
    sheets, exported = label_files(Path(path)) if path else ([], [])
    if path and not any(file.is_file() for file in (*sheets, *exported)):
        raise UserError(
            f"--atlas.labels={path} is no file of labels: name a .csv file, Neuronpedia's .jsonl or .jsonl.gz, or a "
            "folder of such"
        )
    named = ("dictionary",) if len(configs[InterpretConfig].dictionaries) > 1 else ()
    faults = Faults(path, "are no labels", "files")
    for sheet in sheets:
        with faults.collect(sheet.name):
            read_sheet(sheet, (*COLUMNS, *named), "--atlas.labels")
    faults.refuse()


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return what is shown: descriptions, labels by a language model and by people, and effects that were measured."""
    tested, judged = configs[AblateConfig].dictionary, f"explain/{name}"
    measured = configs[TaskConfig].has_behaviours and tested.partition("/")[0] == name
    return inputs_of(
        configs,
        f"interpret/{name}",
        *([judged] if judged in all_stages()["explain"].units(configs) else []),
        *([f"ablate/{folder_name(tested)}"] if measured else []),
        labels=_labels,
        several=_several,
    )


ATLAS = Stage(
    name="atlas",
    summary="writes pages of all features that were interpreted, with labels by people (--atlas.labels)",
    revision=6,  # features without a label are named by three words
    run=run_atlas,
    results=AtlasResults,
    groups=(AtlasConfig,),
    reads=("interpret", "explain", "ablate"),
    inputs=_inputs,
    names=_names,
    check=_check,
    section=links,
)
