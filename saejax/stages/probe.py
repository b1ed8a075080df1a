"""The stage ``probe``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, train_units
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, ProbeConfig, TaskConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    probe, task = configs[ProbeConfig], configs[TaskConfig]
    has_prompts = task.has_behaviours or (probe.benchmarks and task.benchmarks)
    return (folder_name(probe.dictionary),) if probe.labels and has_prompts else ()


def _needs(configs: Configs, name: str) -> Sequence[str]:
    probe, task = configs[ProbeConfig], configs[TaskConfig]
    behaviours = ("baseline",) if task.has_behaviours else ()
    benchmarks = (f"benchmark/{name}" for name in (task.benchmarks if probe.benchmarks else ()))
    return (*behaviours, *benchmarks, *train_units(probe.dictionary))


def _run(run: Run) -> Any:
    from saejax.interventions.probing import run_probe

    return run_probe(run)


def _results() -> Any:
    from saejax.interventions.probing import ProbeResults

    return ProbeResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.interventions.probe_report import sections

    return sections(findings, draw)


PROBE = Stage(
    name="probe",
    summary="probes features and raw activations for labels of the prompts, if --probe.labels names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, ProbeConfig),
    placement=(MeshConfig, TaskConfig),
    reads=("baseline", "benchmark", "train"),
    follows=("ablate",),
    needs=_needs,
    names=_names,
    identity=dict(model=identities.model, dictionary=lambda configs: identities.dictionary(configs, "probe")),
    revision=4,
    processes="items",
    section=_sections,
)
