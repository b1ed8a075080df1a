"""The stage ``patch``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, train_units
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, PatchConfig, TaskConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    """Return the kinds of site that are patched, and the dictionary whose features are patched."""
    patch = configs[PatchConfig]
    wanted = (*patch.kinds, *([folder_name(patch.dictionary)] if patch.dictionary else []))
    return wanted if configs[TaskConfig].has_behaviours else ()


def _needs(configs: Configs, name: str) -> Sequence[str]:
    patch = configs[PatchConfig]
    return ("baseline",) if name in patch.kinds else ("baseline", *train_units(patch.dictionary))


def _dictionary(configs: Configs, name: str) -> str:
    return "" if name in configs[PatchConfig].kinds else identities.dictionary(configs, "patch")


def _run(run: Run) -> Any:
    from saejax.interventions.patching import run_patch

    return run_patch(run)


def _results() -> Any:
    from saejax.interventions.patching import PatchResults

    return PatchResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.interventions.patch_report import sections

    return sections(findings, draw)


def _unread(configs: Configs, name: str) -> Sequence[str]:
    """Return the settings that the unit's code does not read."""
    of_features = ("top", "random_sets", "placebo_targets")
    unread = of_features if name in configs[PatchConfig].kinds else ("positions",)
    return [f"patch.{setting}" for setting in unread]


PATCH = Stage(
    name="patch",
    summary="patches activations between prompts and their counterparts, if --patch.kinds or --patch.dictionary is set",
    run=_run,
    results=_results,
    groups=(ModelConfig, PatchConfig),
    placement=(MeshConfig,),
    reads=("baseline", "train"),
    follows=("ablate",),
    needs=_needs,
    names=_names,
    identity=dict(model=identities.model),
    unit_identity=dict(dictionary=_dictionary),
    unread=_unread,
    revision=5,  # few prompts are not testable
    processes="items",
    section=_sections,
)
