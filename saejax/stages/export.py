"""The stage ``export``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import ExportConfig
from saejax.stages.train import trained_sites


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """Return the units of the dictionaries; for Neuronpedia also of their features' descriptions and labels."""
    format, _, kind = name.partition("-")
    explained = ("capture", f"interpret/{kind}", f"atlas/{kind}") if format == "neuronpedia" else ()
    return (f"train/{kind}", *explained)


def _run(run: Run) -> Any:
    from saejax.exporting.run import run_export

    return run_export(run)


def _results() -> Any:
    from saejax.exporting.results import ExportResults

    return ExportResults


EXPORT = Stage(
    name="export",
    summary="writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets, "
    "Neuronpedia's features",
    run=_run,
    results=_results,
    groups=(ExportConfig,),
    reads=("capture", "train", "interpret", "atlas"),
    follows=("ablate",),
    needs=_needs,
    inputs=trained_sites,
    names=lambda configs: [f"{configs[ExportConfig].format}-{kind}" for kind in configs[ExportConfig].dictionaries],
)
