"""The stage ``probe``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.dictionaries.names import folder_name
from saejax.interventions.probing import ProbeResults
from saejax.interventions.settings import ProbeConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
from saejax.stages.probe.report import sections
from saejax.stages.probe.run import run_probe
from saejax.tasks.settings import TaskConfig


def _names(configs: Configs) -> Sequence[str]:
    probe, task = configs[ProbeConfig], configs[TaskConfig]
    has_prompts = task.has_behaviours or (probe.benchmarks and task.benchmarks)
    return (folder_name(probe.dictionary),) if probe.labels and has_prompts else ()


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    probe, task = configs[ProbeConfig], configs[TaskConfig]
    behaviours = ("baseline",) if task.has_behaviours else ()
    benchmarks = (f"benchmark/{name}" for name in (task.benchmarks if probe.benchmarks else ()))
    units = (*behaviours, *benchmarks, *train_units(probe.dictionary))
    return inputs_of(configs, *units, model=identities.model, dictionary=identities.dictionary("probe"))


PROBE = Stage(
    name="probe",
    summary="probes features and raw activations for labels of the prompts, if --probe.labels names any",
    run=run_probe,
    results=ProbeResults,
    groups=(ModelConfig, ProbeConfig),
    reads=("baseline", "benchmark", "train"),
    follows=("ablate",),
    inputs=_inputs,
    names=_names,
    places=list_folders("probe", "dictionary"),
    revision=9,  # lists from a small pool are no controls
    processes="items",
    section=sections,
)
