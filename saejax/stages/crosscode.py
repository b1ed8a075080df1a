"""The stage ``crosscode``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage, is_folder, train_units
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, TaskConfig
from saejax.stages.train import trained_sites
from saejax.tasks import identities


@dataclasses.dataclass(frozen=True)
class CrosscodeConfig(Config):
    """Comparison of the parts of crosscoders: shared and private features."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "crosscoders, dictionaries of joined sites such as resid_post.5+other:resid_post.5: kinds trained here with "
        "all members of their stacks (batchtopk), members (batchtopk/k32), or folders; empty: none",
    )
    private: float = setting(
        0.9, "relative norm of its row above which a feature seems to be one part's own", low=0.5, high=1.0
    )
    nu_error: float = setting(0.2, "share of it in the other part's error that private features stay below", low=0.0)
    nu_reconstruction: float = setting(0.5, "the same in the other part's reconstruction", low=0.0)
    most: int = setting(256, "features of each part that latent scaling looks at, those that fire most often", low=1)
    tokens: int = setting(0, "held-out tokens that are read; 0: all", low=0)
    resamples: int = setting(200, "bootstrap samples of blocks of documents, and of prompts", low=20)
    top: int = setting(10, "private features of a model that are removed from it together", low=1)
    draws: int = setting(199, "drawn sets of shared and tested features beside them; 0: nothing is removed", low=0)
    matches: int = setting(10, "shared features of like rate and strength that each is drawn from", low=1)
    min_accuracy_drop: float = setting(0.05, "accuracy that a behaviour must lose, as for ablate", low=0.0, high=1.0)
    batch_tokens: int = setting(4096, "tokens run at a time", low=32, changes_results=False)
    seed: int = setting(456, "seed of draws and bootstrap samples", low=0)


def tests_behaviours(configs: Configs) -> bool:
    """Return whether private features are ablated."""
    return (
        configs[TaskConfig].has_behaviours and configs[CrosscodeConfig].draws > 0 and bool(configs[ModelConfig].other)
    )


def _needs(configs: Configs, name: str) -> Sequence[str]:
    prompts = ("baseline",) if tests_behaviours(configs) else ()
    return ("capture", *prompts, *train_units(*configs[CrosscodeConfig].dictionaries))


def _folders(configs: Configs) -> str:
    """Return the identity of dictionaries that are named by their folders."""
    from saejax.dictionaries import stacks

    return " ".join(stacks.identity(name) for name in configs[CrosscodeConfig].dictionaries if is_folder(name))


def _run(run: Run) -> Any:
    from saejax.crosscode.run import run_crosscode

    return run_crosscode(run)


def _results() -> Any:
    from saejax.crosscode.results import CrosscodeResults

    return CrosscodeResults


def _rule(config: Any) -> str:
    from saejax.crosscode.run import rule

    return rule(config)


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.crosscode.report import sections

    return sections(findings, draw)


CROSSCODE = Stage(
    name="crosscode",
    summary="says which features of crosscoders their layers or models share, if --crosscode.dictionaries names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, CrosscodeConfig),
    placement=(MeshConfig,),
    reads=("baseline", "capture", "train"),
    follows=("evaluate",),
    needs=_needs,
    inputs=trained_sites,
    names=lambda configs: ("",) if configs[CrosscodeConfig].dictionaries else (),
    identity=dict(model=identities.model, folders=_folders),
    rule=_rule,
    processes="items",
    section=_sections,
)
