"""The stages ``interpret`` and ``atlas``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage, folder_name
from saejax.runner.workspace import Run
from saejax.settings import AblateConfig, MeshConfig, ModelConfig, TaskConfig, shared, unit_names
from saejax.stages.train import train_members, trained_sites
from saejax.tasks import identities


@dataclasses.dataclass(frozen=True)
class InterpretConfig(Config):
    """Descriptions of the features of trained dictionaries."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of trained dictionaries to interpret, each with all members of its stack; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    attention_tokens: int = setting(
        8192, "tokens of text at which features are compared with what attention heads look at; 0: none", low=0
    )
    categories: bool = setting(
        False,
        "associate features with the behaviours and benchmarks on whose prompts, or right answers, they are active",
    )
    batch_tokens: int = shared.analysis_batch_tokens()
    seed: int = shared.analysis_seed()


@dataclasses.dataclass(frozen=True)
class AtlasConfig(Config):
    """Pages that describe features."""

    labels: str = setting(
        "",
        "a .csv file with labels of your own: columns feature, label, note, reviewer, and where there are several "
        "dictionaries dictionary (such as topk/k32); or a folder of such files, such as a filled copy of the atlas's "
        "review/; they replace automatic labels",
        changes_results=False,  # what is in it counts, not its place
    )


def _labels(configs: Configs) -> str:
    """Return the hash of the files of labels; "" without any."""
    from saejax.files import file_sha256

    path = Path(configs[AtlasConfig].labels or "-")
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    return "-".join(file_sha256(file) for file in files if file.is_file())  # what is missing is said when it runs


def _check(configs: Configs) -> None:
    path = configs[AtlasConfig].labels
    if path and not (Path(path).is_file() or list(Path(path).glob("*.csv"))):
        raise UserError(f"--atlas.labels={path} is no file: name a .csv file of labels or a folder of such")


def _shown(configs: Configs, name: str) -> Sequence[str]:
    """Return the units shown: descriptions, labels by a language model, and effects where they were measured."""
    from saejax.runner.registry import STAGES

    tested, judged = configs[AblateConfig].dictionary, f"explain/{name}"
    measured = configs[TaskConfig].has_behaviours and tested.partition("/")[0] == name
    return (
        f"interpret/{name}",
        *([judged] if judged in STAGES["explain"].units(configs) else []),
        *([f"ablate/{folder_name(tested)}"] if measured else []),
    )


def _names(configs: Configs) -> Sequence[str]:
    return configs[InterpretConfig].dictionaries


def _read(configs: Configs, name: str) -> Sequence[str]:
    """Return the units read: text, dictionaries, and prompts if they are asked for."""
    task = configs[TaskConfig]
    prompts = [*(["baseline"] if task.has_behaviours else []), *(f"benchmark/{name}" for name in task.benchmarks)]
    return ("capture", f"train/{name}", *(prompts if configs[InterpretConfig].categories else ()))


def _run_interpret(run: Run) -> Any:
    from saejax.interpret.run import run_interpret

    return run_interpret(run)


def _results_interpret() -> Any:
    from saejax.interpret.results import InterpretResults

    return InterpretResults


def _sections_interpret(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.interpret.report import sections

    return sections(findings, draw)


INTERPRET = Stage(
    name="interpret",
    summary="says what features mean: examples, tokens, neighbours, labels that are scored, if "
    "--interpret.dictionaries names any",
    revision=6,  # tokens that features raise in a PyTorch model leave its biases out
    run=_run_interpret,
    results=_results_interpret,
    groups=(ModelConfig, InterpretConfig),
    placement=(MeshConfig,),
    reads=("baseline", "benchmark", "capture", "train"),
    needs=_read,
    inputs=trained_sites,
    names=_names,
    identity=dict(model=identities.model),
    members=train_members,
    processes="items",
    section=_sections_interpret,
)


def _run_atlas(run: Run) -> Any:
    from saejax.interpret.atlas import run_atlas

    return run_atlas(run)


def _results_atlas() -> Any:
    from saejax.interpret.results import AtlasResults

    return AtlasResults


def _sections_atlas(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.interpret.report import links

    return links(findings, draw)


ATLAS = Stage(
    name="atlas",
    summary="writes pages of all features that were interpreted, with labels by people (--atlas.labels)",
    revision=4,  # all heatmaps in one file
    run=_run_atlas,
    results=_results_atlas,
    groups=(AtlasConfig,),
    reads=("interpret", "explain", "ablate"),
    needs=_shown,
    names=_names,
    identity=dict(labels=_labels),
    check=_check,
    section=_sections_atlas,
)
