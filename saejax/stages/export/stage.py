"""The stage ``export``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.errors import UserError
from saejax.models.hub import require_token
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages.atlas.labels import (
    check_label_files,
    hash_label_files,
    must_name_dictionaries,
    units_of_labels,
)
from saejax.stages.atlas.settings import AtlasConfig
from saejax.stages.export.results import ExportResults
from saejax.stages.export.run import run_export
from saejax.stages.export.settings import ExportConfig
from saejax.stages.train.members import trained_sites


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    read_by = {"export.push": "saelens", "export.model_id": "neuronpedia", "export.source_set": "neuronpedia"}
    format = configs[ExportConfig].format
    return counted(configs[ExportConfig], but=[setting for setting, of in read_by.items() if of != format])


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return the units of the dictionaries; for Neuronpedia also of descriptions and labels, for the hub of scores."""
    format, _, kind = name.partition("-")
    scored = (f"evaluate/{kind}",) if configs[ExportConfig].push else ()
    if format != "neuronpedia":
        return inputs_of(trained_sites(configs), f"train/{kind}", *scored)
    return inputs_of(
        trained_sites(configs),
        f"train/{kind}",
        "capture",
        *units_of_labels(configs, kind),
        labels=hash_label_files,
        several=must_name_dictionaries,
    )


def _check(configs: Configs) -> None:
    """Raise a ``UserError`` for a push or labels that cannot be, before anything is trained for it."""
    config = configs[ExportConfig]
    if config.push and config.format != "saelens":
        raise UserError(
            f"--export.push={config.push} is for --export.format=saelens, not {config.format}: leave it out"
        )
    if config.push and config.dictionaries:
        require_token()
    if config.dictionaries and config.format == "neuronpedia":
        check_label_files(configs)


EXPORT = Stage(
    name="export",
    summary="writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets, "
    "Neuronpedia's features",
    run=run_export,
    results=ExportResults,
    groups=(ExportConfig, AtlasConfig),
    reads=("capture", "train", "evaluate", "interpret", "explain"),
    follows=("ablate",),
    settings=_settings,
    inputs=_inputs,
    check=_check,
    names=lambda configs: [f"{configs[ExportConfig].format}-{kind}" for kind in configs[ExportConfig].dictionaries],
)
