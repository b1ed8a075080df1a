"""The stage ``probe``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, train_units
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, ProbeConfig, TaskConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    asked = configs[ProbeConfig].labels and configs[TaskConfig].has_behaviours
    return (folder_name(configs[ProbeConfig].dictionary),) if asked else ()


def _run(run: Run) -> Any:
    from saejax.causal.probes.run import run_probe

    return run_probe(run)


def _results() -> Any:
    from saejax.causal.probes.results import ProbeResults

    return ProbeResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.causal.probes.report import sections

    return sections(findings, draw)


PROBE = Stage(
    name="probe",
    summary="probes features and raw activations for labels of the prompts, if --probe.labels names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, ProbeConfig),
    placement=(MeshConfig,),
    reads=("baseline", "train"),
    follows=("ablate",),
    needs=lambda configs, name: ("baseline", *train_units(configs[ProbeConfig].dictionary)),
    names=_names,
    identity=dict(model=identities.model, dictionary=lambda configs: identities.dictionary(configs, "probe")),
    processes="items",
    section=_sections,
)
