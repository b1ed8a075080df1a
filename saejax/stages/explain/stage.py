"""The stage ``explain``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.errors import UserError
from saejax.interpret.results import ExplainResults
from saejax.interpret.settings import ExplainConfig
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages.explain.run import run_explain
from saejax.stages.interpret.report import explain_sections
from saejax.stages.train.members import trained_sites


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    return inputs_of(trained_sites(configs), "capture", f"train/{name}", f"interpret/{name}")


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings that labels depend on; in another order the same features and scores ask no question anew."""
    explain = configs[ExplainConfig]
    values = counted(explain, but=["explain.sample"] if explain.features else [])
    return values | {f"explain.{name}": sorted(set(getattr(explain, name))) for name in ("features", "scores")}


def _check(configs: Configs) -> None:
    """Raise a ``UserError`` unless an endpoint and its model are named."""
    config = configs[ExplainConfig]
    if "detection" not in config.scores:
        raise UserError("--explain.scores lacks detection, which decides what labels are kept: add it")
    if not config.model:
        raise UserError("--explain.model is missing: name a model of the endpoint")
    if not config.url:
        raise UserError("--explain.url is missing: name an endpoint, such as http://localhost:8000/v1")


EXPLAIN = Stage(
    name="explain",
    summary="has a language model write labels of features and judge them on held-out text, if --explain.dictionaries "
    "names any",
    revision=6,  # nothing fires at sinks of a transcoder's target
    run=run_explain,
    results=ExplainResults,
    groups=(ExplainConfig,),
    settings=_settings,
    reads=("capture", "train", "interpret"),
    inputs=_inputs,
    names=lambda configs: configs[ExplainConfig].dictionaries,
    check=_check,
    section=explain_sections,
)
