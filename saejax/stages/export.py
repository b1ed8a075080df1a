"""The stage ``export``."""

from collections.abc import Sequence

from saejax.runner.config import Configs
from saejax.runner.stage import Stage
from saejax.settings import ExportConfig


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """The dictionaries; for Neuronpedia also what was found of their features, and what they are called."""
    format, _, kind = name.partition("-")
    explained = ("capture", f"interpret/{kind}", f"atlas/{kind}") if format == "neuronpedia" else ()
    return (f"train/{kind}", *explained)


EXPORT = Stage(
    name="export",
    summary="writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets, "
    "Neuronpedia's features",
    run="saejax.exporting.run:run_export",
    results="saejax.exporting.results:ExportResults",
    groups=(ExportConfig,),
    reads=("capture", "train", "interpret", "atlas"),
    follows=("ablate",),
    needs=_needs,
    names=lambda configs: [f"{configs[ExportConfig].format}-{kind}" for kind in configs[ExportConfig].dictionaries],
)
