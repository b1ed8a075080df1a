"""The stage ``explain``."""

from saejax.interpret.results import ExplainResults
from saejax.interpret.settings import ExplainConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
from saejax.stages.explain.run import check, run_explain
from saejax.stages.interpret.report import explain_sections
from saejax.stages.train.members import trained_sites

EXPLAIN = Stage(
    name="explain",
    summary="has a language model write labels of features and judge them on held-out text, if --explain.dictionaries "
    "names any",
    revision=4,  # tokens that spell a character together are read as one
    run=run_explain,
    results=ExplainResults,
    groups=(ExplainConfig,),
    placement=(MeshConfig,),
    reads=("capture", "train", "interpret"),
    needs=lambda configs, name: ("capture", f"train/{name}", f"interpret/{name}"),
    inputs=trained_sites,
    names=lambda configs: configs[ExplainConfig].dictionaries,
    check=check,
    section=explain_sections,
)
