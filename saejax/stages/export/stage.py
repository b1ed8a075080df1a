"""The stage ``export``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.errors import UserError
from saejax.models.hub import require_token
from saejax.runner.stage import Input, Stage, inputs_of
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
    explained = ("capture", f"interpret/{kind}", f"atlas/{kind}") if format == "neuronpedia" else ()
    scored = (f"evaluate/{kind}",) if configs[ExportConfig].push else ()
    return inputs_of(trained_sites(configs), f"train/{kind}", *explained, *scored)


def _check(configs: Configs) -> None:
    """Raise a ``UserError`` for a push that cannot be, before anything is trained for it."""
    config = configs[ExportConfig]
    if config.push and config.format != "saelens":
        raise UserError(
            f"--export.push={config.push} is for --export.format=saelens, not {config.format}: leave it out"
        )
    if config.push and config.dictionaries:
        require_token()


EXPORT = Stage(
    name="export",
    summary="writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets, "
    "Neuronpedia's features",
    run=run_export,
    results=ExportResults,
    groups=(ExportConfig,),
    reads=("capture", "train", "evaluate", "interpret", "atlas"),
    follows=("ablate",),
    settings=_settings,
    inputs=_inputs,
    check=_check,
    names=lambda configs: [f"{configs[ExportConfig].format}-{kind}" for kind in configs[ExportConfig].dictionaries],
)
