"""The stage ``patch``."""

from collections.abc import Sequence
from typing import Any

from saejax.config import Configs, counted
from saejax.dictionaries.names import folder_name
from saejax.interventions.patching import PatchResults
from saejax.interventions.settings import PatchConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
from saejax.stages.patch.report import sections
from saejax.stages.patch.run import run_patch
from saejax.tasks.settings import TaskConfig


def _names(configs: Configs) -> Sequence[str]:
    """Return the kinds of site that are patched, and the dictionary whose features are patched."""
    patch = configs[PatchConfig]
    wanted = (*patch.kinds, *([folder_name(patch.dictionary)] if patch.dictionary else []))
    return wanted if configs[TaskConfig].has_behaviours else ()


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    of_features = ("patch.random_sets", "patch.placebo_targets")
    unread = of_features if name in configs[PatchConfig].kinds else ("patch.positions",)
    return counted(configs[ModelConfig], configs[PatchConfig], but=unread)


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    patch = configs[PatchConfig]
    if name in patch.kinds:
        return inputs_of(configs, "baseline", model=identities.model)
    units = ("baseline", *train_units(patch.dictionary))
    return inputs_of(configs, *units, model=identities.model, dictionary=identities.dictionary("patch"))


PATCH = Stage(
    name="patch",
    summary="patches activations between prompts and their counterparts, if --patch.kinds or --patch.dictionary is set",
    run=run_patch,
    results=PatchResults,
    groups=(ModelConfig, PatchConfig),
    reads=("baseline", "train"),
    follows=("ablate",),
    settings=_settings,
    inputs=_inputs,
    names=_names,
    places=list_folders("patch", "dictionary"),
    revision=11,  # means that are not testable are not corrected for
    processes="items",
    section=sections,
)
