"""The stage ``study``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.stage import Stage, train_units
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, StudyConfig, TaskConfig
from saejax.tasks import identities


def _run(run: Run) -> Any:
    from saejax.causal.study.run import run_study

    return run_study(run)


def _results() -> Any:
    from saejax.causal.study.results import StudyResults

    return StudyResults


def _rule(config: Any) -> str:
    from saejax.causal.study.scores import rule

    return rule(config)


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.causal.study.report import sections

    return sections(findings, draw)


STUDY = Stage(
    name="study",
    summary="scores benchmarks without top features, beside matched random ones, if --study.benchmarks names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, TaskConfig, StudyConfig),
    placement=(MeshConfig,),
    reads=("train",),
    follows=("ablate",),
    needs=lambda configs, name: train_units(configs[StudyConfig].dictionary),
    names=lambda configs: configs[StudyConfig].benchmarks,
    identity=dict(model=identities.model, dictionary=lambda configs: identities.dictionary(configs, "study")),
    unit_identity=dict(benchmark=identities.benchmark),
    rule=_rule,
    processes="items",
    section=_sections,
)
