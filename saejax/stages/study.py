"""The stage ``study``."""

from collections.abc import Sequence
from typing import Any

from saejax.errors import one_of
from saejax.runner.config import Configs
from saejax.runner.stage import Stage, is_folder, train_units
from saejax.runner.workspace import Run, fingerprint
from saejax.settings import BASES, MeshConfig, ModelConfig, StudyConfig, TaskConfig
from saejax.tasks import identities


def _dictionaries(configs: Configs) -> tuple[str, ...]:
    """Return the dictionaries that are tested, the main one first."""
    study = configs[StudyConfig]
    return tuple(dict.fromkeys((study.dictionary, *study.repeats)))


def _bases(configs: Configs) -> str:
    """Return the identity of dictionaries that are named by their folders."""
    from saejax.dictionaries import stacks

    names = (*_dictionaries(configs), *configs[StudyConfig].baselines)
    return fingerprint([stacks.identity(name) for name in names if is_folder(name)])


def _benchmarks(configs: Configs) -> str:
    """Return the identity of all benchmarks: features chosen on each are ablated on the others."""
    return fingerprint([identities.benchmark(configs, name) for name in configs[StudyConfig].benchmarks])


def _check(configs: Configs) -> None:
    for name in configs[StudyConfig].baselines:
        if not is_folder(name):
            one_of(name, BASES, "basis (--study.baselines), and no folder of a dictionary:")


def _run(run: Run) -> Any:
    from saejax.studies.benchmark_run import run_study

    return run_study(run)


def _results() -> Any:
    from saejax.studies.benchmark_results import StudyResults

    return StudyResults


def _rule(config: Any) -> str:
    from saejax.studies.benchmark_run import rule

    return rule(config)


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.studies.benchmark_report import sections

    return sections(findings, draw)


STUDY = Stage(
    name="study",
    summary="ablates top features and control sets on benchmarks, if --study.benchmarks names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, TaskConfig, StudyConfig),
    placement=(MeshConfig,),
    reads=("train",),
    follows=("ablate",),
    needs=lambda configs, name: train_units(*_dictionaries(configs)),
    names=lambda configs: configs[StudyConfig].benchmarks,
    identity=dict(model=identities.model, bases=_bases, benchmarks=_benchmarks),
    unit_identity=dict(benchmark=identities.benchmark),
    check=_check,
    rule=_rule,
    revision=5,  # few items are not testable; bases of dictionaries that normalise tokens; number bases
    processes="items",
    section=_sections,
)
