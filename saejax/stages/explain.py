"""The stage ``explain``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, unit_names
from saejax.stages.train import trained_sites

FOUND = "found"  # in the place of a file of labels: those of ``interpret``


@dataclasses.dataclass(frozen=True)
class ExplainConfig(Config):
    """Labels written and judged by a language model."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of dictionaries, interpreted before, whose features are labelled, each with all members; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    url: str = setting(
        "",
        "address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1; the key, if it wants one, is "
        "taken from the environment variable OPENAI_API_KEY; empty: --explain.model runs here",
    )
    model: str = setting("", "the model's name at the endpoint; without one a hub id, a folder or a GGUF file")
    features: tuple[int, ...] = setting((), "numbers of the features; empty: a draw of --explain.sample", low=0)
    sample: int = setting(100, "features drawn of those that fire on enough held-out text", low=1)
    given: str = setting(
        "",
        "labels that are judged in place of written ones: a .csv file as --atlas.labels takes, or found, those of "
        "interpret",
    )
    draws: int = setting(
        1, "contexts drawn from each tenth of a feature's held-out firings; as many without it are shown", low=1
    )
    scores: tuple[str, ...] = setting(
        ("fuzzing", "intruder"),
        "what is asked beside detection, which decides whether a label is kept",
        choices=("fuzzing", "intruder"),
    )
    embedding_model: str = setting(
        "",
        "a model at the endpoint that embeds texts: labels are also scored by their closeness to contexts; empty: no",
    )
    most_tokens: int = setting(
        2_000_000,
        "tokens that may be spent, prompts and answers together, those of earlier runs of the unit counted",
        low=1,
        changes_results=False,
    )
    concurrent: int = setting(8, "questions that are asked at a time", low=1, changes_results=False)
    timeout: float = setting(60.0, "seconds that an answer of the endpoint may take", low=0.1, changes_results=False)
    seed: int = setting(321, "seed of what is drawn: features, contexts without them, the order of contexts", low=0)


def _given(configs: Configs) -> str:
    """Return the hash of the file of labels; "" without one."""
    from saejax.files import file_sha256

    path = Path(configs[ExplainConfig].given)
    return file_sha256(path) if path.is_file() else ""  # what is missing is said when it runs


def _judge(configs: Configs) -> str:
    """Return the fingerprint of the model that runs here; "" for one at an endpoint."""
    from saejax.models.source import resolve

    config = configs[ExplainConfig]
    return "" if config.url or not config.model else resolve(ModelConfig(path=config.model), decoder=True).fingerprint


def check(configs: Configs) -> None:
    """Raise a ``UserError`` unless a model is named that can judge, and the file of labels exists."""
    config = configs[ExplainConfig]
    if not config.model:
        raise UserError("--explain.model is missing: name a model of the endpoint, or one that can be loaded")
    if config.embedding_model and not config.url:
        raise UserError("--explain.embedding_model is a model of an endpoint: name that by --explain.url")
    if config.given not in ("", FOUND) and not Path(config.given).is_file():
        raise UserError(f"--explain.given={config.given} cannot be read: name a .csv file of labels, or {FOUND}")


def _run(run: Run) -> Any:
    from saejax.explain.run import run_explain

    return run_explain(run)


def _results() -> Any:
    from saejax.explain.results import ExplainResults

    return ExplainResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.explain.report import sections

    return sections(findings, draw)


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
    identity=dict(given=_given, judge=_judge),
    check=check,
    section=_sections,
)
