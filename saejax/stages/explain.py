"""The stage ``explain``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.errors import UserError
from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, shared, unit_names
from saejax.stages.train import trained_sites


@dataclasses.dataclass(frozen=True)
class ExplainConfig(Config):
    """Labels written and judged by a language model."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of interpreted dictionaries whose features to label, each with all members of its stack; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    url: str = setting(
        "",
        "address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1; the environment variable "
        "OPENAI_API_KEY has its key",
    )
    model: str = setting("", "name of the model at the endpoint")
    features: tuple[int, ...] = setting((), "indices of the features to label; empty: a random --explain.sample", low=0)
    sample: int = setting(100, "number of random features among those that fire often enough on held-out text", low=1)
    most_tokens: int = setting(
        2_000_000,
        "number of tokens (prompts and answers, earlier runs of the unit included) after which no further question "
        "is asked; up to 64 questions under way still count on top",
        low=1,
        changes_results=False,
    )
    seed: int = shared.analysis_seed()


def check(configs: Configs) -> None:
    """Raise a ``UserError`` unless an endpoint and its model are named."""
    config = configs[ExplainConfig]
    if not config.model:
        raise UserError("--explain.model is missing: name a model of the endpoint")
    if not config.url:
        raise UserError("--explain.url is missing: name an endpoint, such as http://localhost:8000/v1")


def _run(run: Run) -> Any:
    from saejax.interpret.explain import run_explain

    return run_explain(run)


def _results() -> Any:
    from saejax.interpret.results import ExplainResults

    return ExplainResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.interpret.report import explain_sections

    return explain_sections(findings, draw)


EXPLAIN = Stage(
    name="explain",
    summary="has a language model write labels of features and judge them on held-out text, if --explain.dictionaries "
    "names any",
    revision=3,  # wider intervals with few silent contexts, no label without a control's score
    run=_run,
    results=_results,
    groups=(ExplainConfig,),
    placement=(MeshConfig,),
    reads=("capture", "train", "interpret"),
    needs=lambda configs, name: ("capture", f"train/{name}", f"interpret/{name}"),
    inputs=trained_sites,
    names=lambda configs: configs[ExplainConfig].dictionaries,
    check=check,
    section=_sections,
)
