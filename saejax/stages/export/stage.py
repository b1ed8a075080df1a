"""The stage ``export``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.runner.stage import Stage
from saejax.stages.export.results import ExportResults
from saejax.stages.export.run import run_export
from saejax.stages.export.settings import ExportConfig
from saejax.stages.train.members import trained_sites


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """Return the units of the dictionaries; for Neuronpedia also of their features' descriptions and labels."""
    format, _, kind = name.partition("-")
    explained = ("capture", f"interpret/{kind}", f"atlas/{kind}") if format == "neuronpedia" else ()
    return (f"train/{kind}", *explained)


EXPORT = Stage(
    name="export",
    summary="writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets, "
    "Neuronpedia's features",
    run=run_export,
    results=ExportResults,
    groups=(ExportConfig,),
    reads=("capture", "train", "interpret", "atlas"),
    follows=("ablate",),
    needs=_needs,
    inputs=trained_sites,
    names=lambda configs: [f"{configs[ExportConfig].format}-{kind}" for kind in configs[ExportConfig].dictionaries],
)
