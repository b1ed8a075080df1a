"""The stage ``export``."""

from saejax.settings import ExportConfig
from saejax.stage import Stage

EXPORT = Stage(
    name="export",
    summary="writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets",
    run="saejax.dictionaries.export:run_export",
    results="saejax.dictionaries.results:ExportResults",
    groups=(ExportConfig,),
    after=("train", "ablate"),
    needs=lambda configs, name: (f"train/{name.partition('-')[2]}",),
    names=lambda configs: [f"{configs['export'].format}-{kind}" for kind in configs["export"].dictionaries],
)
