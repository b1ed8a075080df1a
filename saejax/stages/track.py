"""The stage ``track``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage, folder_name, is_folder, split_unit, train_units
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, shared
from saejax.stages.interpret import InterpretConfig
from saejax.tasks import identities


@dataclasses.dataclass(frozen=True)
class TrackConfig(Config):
    """Prompts and worked solutions, followed through the layers."""

    prompt: str = setting("", "the text to follow; its sentences are the steps")
    prompts: str = setting(
        "",
        'file of up to four instead, shown side by side, .jsonl: {"slug": "apples", "prompt": "...", "solution": '
        '"...", "answer": " 12"}; the sentences of a solution, or the texts of a list of them, are the steps',
    )
    generate: int = setting(
        0,
        "tokens that the model writes after each prompt, shown as its output; the output of a prompt without a "
        "solution is followed as one (0: none)",
        low=0,
    )
    dictionaries: tuple[str, ...] = setting(
        (),
        "dictionaries of the layers: trained stacks such as topk, members such as topk/resid_post.3, or folders; at "
        "most one of each layer",
    )
    random_sets: int = shared.random_sets()
    seed: int = shared.causal_seed()


def _names(configs: Configs) -> Sequence[str]:
    """Return the unit of the texts that are followed; none if there are none."""
    from saejax.errors import UserError

    config = configs[TrackConfig]
    if config.prompt and config.prompts:
        raise UserError("--track.prompt and --track.prompts: expected one of them")
    if not config.prompt and not config.prompts:
        return ()
    if not config.dictionaries:
        raise UserError("--track.dictionaries is missing: name dictionaries of some layers, such as a stack's topk")
    return (folder_name(Path(config.prompts).name.split(".")[0] if config.prompts else config.prompt[:40]),)


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """Return the units of the dictionaries, and of their features' descriptions where this run makes them."""
    units = train_units(*configs[TrackConfig].dictionaries)
    tracked = {split_unit(unit)[0] for unit in units}
    labelled = [f"interpret/{kind}" for kind in configs[InterpretConfig].dictionaries if f"train/{kind}" in tracked]
    return (*units, *labelled, *(unit.replace("interpret", "atlas", 1) for unit in labelled))


def _files(configs: Configs) -> str:
    """Return the hash of the files that flags name: texts, dictionaries and their labels."""
    from saejax.dictionaries import stacks
    from saejax.dictionaries.labels import LABELS
    from saejax.files import file_sha256
    from saejax.runner.workspace import fingerprint

    config = configs[TrackConfig]
    folders = [Path(name) for name in config.dictionaries if is_folder(name) and Path(name).is_dir()]
    labels = [path for folder in folders for path in sorted(folder.parent.parent.glob(f"*/{folder.name}/**/{LABELS}"))]
    files = [*(Path(name) for name in (config.prompts,) if name), *labels]
    marks = [file_sha256(path) for path in files if path.is_file()]  # what is missing is said when it runs
    return fingerprint([*marks, *(stacks.identity(str(folder)) for folder in folders)])


def _run(run: Run) -> Any:
    from saejax.matching.track.run import run_track

    return run_track(run)


def _results() -> Any:
    from saejax.matching.track.results import TrackResults

    return TrackResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.matching.track.report import sections

    return sections(findings, draw)


TRACK = Stage(
    name="track",
    summary="follows prompts and worked solutions through the layers that have dictionaries, if --track.prompt or "
    "--track.prompts is set",
    run=_run,
    results=_results,
    groups=(ModelConfig, TrackConfig),
    placement=(MeshConfig,),
    reads=("train", "interpret", "atlas"),
    needs=_needs,
    names=_names,
    identity=dict(model=identities.model, track=_files),
    revision=8,  # answers in scripts without spaces are followed where they stand
    processes="items",
    section=_sections,
)
