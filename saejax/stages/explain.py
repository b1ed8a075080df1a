"""The stage ``explain``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, shared, unit_names
from saejax.stages.train import trained_sites

INTERPRETED = "interpret"  # value of ``--explain.labels`` that names the labels of ``interpret`` instead of a file


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
        "OPENAI_API_KEY has its key; empty: --explain.model runs here",
    )
    model: str = setting("", "name of the model at the endpoint; without one a hub id, a folder or a GGUF file")
    features: tuple[int, ...] = setting((), "numbers of the features; empty: a random --explain.sample", low=0)
    sample: int = setting(100, "number of random features among those that fire often enough on held-out text", low=1)
    labels: str = setting(
        "",
        "labels to judge instead of writing new ones: a .csv file as for --atlas.labels, or interpret, those of that "
        "stage",
    )
    most_tokens: int = setting(
        2_000_000,
        "largest number of tokens to spend, prompts and answers, earlier runs of the unit included",
        low=1,
        changes_results=False,
    )
    seed: int = shared.analysis_seed()


def _hash_labels(configs: Configs) -> str:
    """Return the hash of the file of labels; empty if there is none, which the run then reports."""
    from saejax.files import file_sha256

    path = Path(configs[ExplainConfig].labels)
    return file_sha256(path) if path.is_file() else ""


def _judge(configs: Configs) -> str:
    """Return the fingerprint of the model that runs here."""
    from saejax.models.source import resolve

    config = configs[ExplainConfig]
    return "" if config.url or not config.model else resolve(ModelConfig(path=config.model), decoder=True).fingerprint


def check(configs: Configs) -> None:
    """Raise a ``UserError`` unless a model is named, and the file of labels exists."""
    config = configs[ExplainConfig]
    if not config.model:
        raise UserError("--explain.model is missing: name a model of the endpoint, or one that can be loaded")
    if config.labels not in ("", INTERPRETED) and not Path(config.labels).is_file():
        raise UserError(
            f"--explain.labels={config.labels} cannot be read: name a .csv file of labels, or {INTERPRETED}"
        )


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
    run=_run,
    results=_results,
    groups=(ExplainConfig,),
    placement=(MeshConfig,),
    reads=("capture", "train", "interpret"),
    needs=lambda configs, name: ("capture", f"train/{name}", f"interpret/{name}"),
    inputs=trained_sites,
    names=lambda configs: configs[ExplainConfig].dictionaries,
    identity=dict(labels=_hash_labels, judge=_judge),
    check=check,
    section=_sections,
)
