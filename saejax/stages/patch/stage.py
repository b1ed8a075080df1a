"""The stage ``patch``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.dictionaries.names import folder_name
from saejax.interventions.patching import PatchResults
from saejax.interventions.settings import PatchConfig
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage, train_units
from saejax.stages import identities
from saejax.stages.patch.report import sections
from saejax.stages.patch.run import run_patch
from saejax.tasks.settings import TaskConfig


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


def _unread(configs: Configs, name: str) -> Sequence[str]:
    """Return the settings that the unit's code does not read."""
    of_features = ("top", "random_sets", "placebo_targets")
    unread = of_features if name in configs[PatchConfig].kinds else ("positions",)
    return [f"patch.{setting}" for setting in unread]


PATCH = Stage(
    name="patch",
    summary="patches activations between prompts and their counterparts, if --patch.kinds or --patch.dictionary is set",
    run=run_patch,
    results=PatchResults,
    groups=(ModelConfig, PatchConfig),
    placement=(MeshConfig,),
    reads=("baseline", "train"),
    follows=("ablate",),
    needs=_needs,
    names=_names,
    identity=dict(model=identities.model),
    unit_identity=dict(dictionary=_dictionary),
    unread=_unread,
    revision=6,  # controls of one dose, measured there; other answers
    processes="items",
    section=sections,
)
