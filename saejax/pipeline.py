"""The graph of stages, and how they are run: found finished, resumed, or done anew.

preflight   baseline ──► capture ──► train/<kind> ──► evaluate/<kind>
                │           │             │                │
                ├───────────┴─► ablate ◄──┤                │
                └─────────────► probe  ◄──┤                │
                                   │    study/<name>       │
                                   └─────┴► report ◄───────┘
            benchmark/<name> ─────────────────┘
            patch/<kind of site> ─────────────┤
            attribute/<slug> ─────────────────┘
"""

import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax import config as configuration
from saejax.errors import Interrupted, UserError, one_of
from saejax.models.sites import ModuleSite
from saejax.settings import BASES
from saejax.workspace import SUMMARY, Run, Workspace, fingerprint, now, package_versions

Configs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      summary: what it does, one line.
      function: "module:function" that does it; imported only when it runs.
      groups: the groups of configuration its result depends on.
      placement: groups it reads that change only where and how fast it is computed.
      needs: the units it reads, given the configuration, as "stage" or "stage/name".
      names: its units' names, given the configuration; [""] for one unit.
      sources: what it reads from outside the workdir: "model", "corpus", "prompts", "benchmark" (the unit's own),
        "shapes" (the sizes of the models that preflight checks), "units" (which causal units are asked for, and what
        is known of graphs before), "initial" (dictionaries that training starts from), "stream" (model, text and
        settings of training straight from the model), "bases" (dictionaries beside the one that is tested).
      many_processes: whether it can run in several.
    """

    summary: str
    function: str
    groups: tuple[str, ...]
    placement: tuple[str, ...] = ()
    needs: Callable[[Configs, str], Sequence[str]] = lambda configs, name: ()
    names: Callable[[Configs], Sequence[str]] = lambda configs: ("",)
    sources: tuple[str, ...] = ()
    many_processes: bool = False


def _kinds(configs: Configs) -> Sequence[str]:
    return configs["train"].kinds


def _report_needs(configs: Configs, name: str) -> Sequence[str]:
    trained = [f"{stage}/{kind}" for stage in ("train", "evaluate") for kind in _kinds(configs)]
    benchmarks = [f"benchmark/{benchmark}" for benchmark in configs["task"].benchmarks]
    probes = [f"probe/{name}" for name in _probed(configs)]
    patched = [f"patch/{name}" for name in _patched(configs)]
    studies = [f"study/{benchmark}" for benchmark in configs["study"].benchmarks]
    asked = [*probes, *patched, *studies, *(f"attribute/{name}" for name in _graphs(configs))]
    return ("baseline", *benchmarks, "capture", *trained, f"ablate/{_unit_of(configs, 'ablate')}", *asked)


def _asks(configs: Configs) -> bool:
    """Whether there are behaviours to test."""
    return bool(configs["task"].behaviours or configs["task"].prompts)


def _unit_of(configs: Configs, stage: str) -> str:
    """The name of a stage's unit of the dictionary "topk", or "topk/k16": it has a folder of its own, "topk-k16"."""
    return configs[stage].dictionary.replace("/", "-")


def _train_unit(configs: Configs, stage: str) -> str:
    """The unit that trained a stage's dictionary."""
    return f"train/{configs[stage].dictionary.partition('/')[0]}"


def _tested(configs: Configs) -> Sequence[str]:
    return (_unit_of(configs, "ablate"),) if _asks(configs) else ()


def _ablate_needs(configs: Configs, name: str) -> Sequence[str]:
    """The units of the tested dictionary and of those that it is compared with."""
    kinds = [name.partition("/")[0] for name in configs["ablate"].compare]
    return tuple(dict.fromkeys(("baseline", _train_unit(configs, "ablate"), *(f"train/{kind}" for kind in kinds))))


def _probed(configs: Configs) -> Sequence[str]:
    return (_unit_of(configs, "probe"),) if configs["probe"].labels and _asks(configs) else ()


def _patched(configs: Configs) -> Sequence[str]:
    """The kinds of site that are patched, and the dictionary whose features are."""
    patch = configs["patch"]
    wanted = (*patch.kinds, *([_unit_of(configs, "patch")] if patch.dictionary else []))
    return wanted if _asks(configs) else ()


def _graphs(configs: Configs) -> Sequence[str]:
    """The unit of the graphs that are asked for."""
    name = importlib.import_module("saejax.attribution.requests").unit_name(configs["graph"])
    return (name,) if name else ()


def _patch_needs(configs: Configs, name: str) -> Sequence[str]:
    return ("baseline",) if name in configs["patch"].kinds else ("baseline", _train_unit(configs, "patch"))


STAGES = {
    "preflight": Stage(
        "says what will run, whether it fits, and roughly how long it takes",
        "saejax.preflight.checks:run_preflight",
        (
            *("preflight", "model", "mesh", "task", "corpus", "capture", "train", "evaluate"),
            *("ablate", "patch", "probe", "study", "graph", "report"),
        ),
        sources=("shapes", "corpus", "prompts", "units"),
    ),
    "baseline": Stage(
        "measures the behaviours: accuracy and logit differences on train and test prompts",
        "saejax.tasks.baseline:run_baseline",
        ("model", "task"),
        ("mesh",),
        sources=("model", "prompts"),
    ),
    "benchmark": Stage(
        "scores the model on benchmarks, if --task.benchmarks names any: gsm8k, math, logic",
        "saejax.tasks.benchmark_stage:run_benchmark",
        ("model", "task"),
        ("mesh",),
        names=lambda configs: configs["task"].benchmarks,
        sources=("model", "benchmark"),
    ),
    "capture": Stage(
        "records activations of the model at the wanted sites",
        "saejax.activations.capture:run_capture",
        ("model", "corpus", "capture"),
        ("mesh",),
        needs=lambda configs, name: ("baseline",) if _asks(configs) else (),
        sources=("model", "corpus"),
    ),
    "train": Stage(
        "trains sparse dictionaries on the captured activations",
        "saejax.training.train:run_train",
        ("train",),
        ("mesh",),
        needs=lambda configs, name: ("capture",) if configs["train"].source == "store" else (),
        names=_kinds,
        sources=("initial", "stream"),
        many_processes=True,
    ),
    "evaluate": Stage(
        "scores dictionaries on held-out text: fidelity, sparsity, cross-entropy recovered",
        "saejax.evaluation.evaluate:run_evaluate",
        ("model", "evaluate"),
        ("mesh",),
        needs=lambda configs, name: ("capture", f"train/{name}"),
        names=_kinds,
        sources=("model",),
    ),
    "ablate": Stage(
        "ablates top features against matched random ones and says which features cause the behaviours",
        "saejax.causal.ablate.stage:run_ablate",
        ("model", "ablate"),
        ("mesh",),
        needs=_ablate_needs,
        names=_tested,
        sources=("model", "bases"),
        many_processes=True,
    ),
    "probe": Stage(
        "probes features and raw activations for labels of the prompts, if --probe.labels names any",
        "saejax.causal.probes.stage:run_probe",
        ("model", "probe"),
        ("mesh",),
        needs=lambda configs, name: ("baseline", _train_unit(configs, "probe")),
        names=_probed,
        sources=("model",),
    ),
    "patch": Stage(
        "patches activations between prompts and their counterparts, if --patch.kinds or --patch.dictionary is set",
        "saejax.causal.patching.stage:run_patch",
        ("model", "patch"),
        ("mesh",),
        needs=_patch_needs,
        names=_patched,
        sources=("model",),
    ),
    "study": Stage(
        "scores benchmarks without top features, beside matched random ones, if --study.benchmarks names any",
        "saejax.causal.study.stage:run_study",
        ("model", "task", "study"),
        ("mesh",),
        needs=lambda configs, name: (_train_unit(configs, "study"),),
        names=lambda configs: configs["study"].benchmarks,
        sources=("model", "benchmark"),
    ),
    "attribute": Stage(
        "traces prompts into attribution graphs, if --graph.prompt, token_ids, prompts or behaviours is set",
        "saejax.attribution.stage:run_attribute",
        ("model", "graph"),
        ("mesh",),
        needs=lambda configs, name: ("baseline",) if configs["graph"].behaviours else (),
        names=_graphs,
        sources=("model", "graph"),
        many_processes=True,
    ),
    "export": Stage(
        "writes trained dictionaries in the formats of other tools: SAELens folders, circuit-tracer sets",
        "saejax.dictionaries.export:run_export",
        ("export",),
        needs=lambda configs, name: (f"train/{name.partition('-')[2]}",),
        names=lambda configs: [f"{configs['export'].format}-{kind}" for kind in configs["export"].dictionaries],
    ),
    "report": Stage(
        "writes the report: index.html, report.md, figures",
        "saejax.reporting.report:run_report",
        ("report",),
        needs=_report_needs,
        names=lambda configs: ("",) if _asks(configs) else (),
    ),
}


class Plan:
    """The units of a configuration and their fingerprints.

    Args:
      configs: the groups of configuration.
    """

    def __init__(self, configs: Configs):
        self.configs = configs
        self._marks: dict[str, str] = {}

    def units(self, stage: str) -> list[str]:
        """The stage's units, as "stage" or "stage/name"."""
        return [f"{stage}/{name}" if name else stage for name in STAGES[stage].names(self.configs)]

    def needs(self, unit: str) -> list[str]:
        """The units that a unit reads."""
        stage, _, name = unit.partition("/")
        needs = list(STAGES[stage].needs(self.configs, name))
        for need in needs:
            needed_stage, _, needed_name = need.partition("/")
            if needed_name:
                one_of(needed_name, STAGES[needed_stage].names(self.configs), f"dictionary for {stage} (--train.kinds)")
        return needs

    def mark(self, unit: str) -> str:
        """The unit's fingerprint: a hash of its settings, of the units it reads and of the files from outside."""
        if unit not in self._marks:
            stage, _, name = unit.partition("/")
            data = dict(
                unit=unit,
                settings={group: configuration.identity(self.configs[group], name) for group in STAGES[stage].groups},
                needs={need: self.mark(need) for need in self.needs(unit)},
                sources={source: self._source(source, name) for source in STAGES[stage].sources},
            )
            self._marks[unit] = fingerprint(data)
        return self._marks[unit]

    def _source(self, source: str, name: str) -> str:
        key = f"<{source}/{name}>" if source == "benchmark" else f"<{source}>"
        if key not in self._marks:
            if source == "model":
                decoder = not all(map(ModuleSite.names, self.configs["capture"].sites))
                resolve = importlib.import_module("saejax.models.source").resolve
                mark = resolve(self.configs[source], decoder).fingerprint
            elif source == "shapes":
                mark = importlib.import_module("saejax.preflight.shapes").identity(self.configs)
            elif source == "units":
                asked = [
                    unit for stage in ("ablate", "patch", "probe", "study", "attribute") for unit in self.units(stage)
                ]
                mark = fingerprint(asked)
            elif source == "initial":
                folder = self.configs["train"].init_from
                mark = importlib.import_module("saejax.training.initial").identity(folder) if folder else ""
            elif source == "bases":
                folders = [name for name in self.configs["ablate"].baselines if name not in BASES]
                identity = importlib.import_module("saejax.training.initial").identity
                mark = fingerprint([identity(folder) for folder in folders])
            elif source == "stream":
                mark = self._stream() if self.configs["train"].source == "model" else ""
            elif source == "graph":
                mark = importlib.import_module("saejax.attribution.requests").identity(self.configs["graph"])
            elif source == "prompts":
                mark = importlib.import_module("saejax.tasks.own_prompts").identity(self.configs["task"])
            elif source == "benchmark":
                mark = importlib.import_module("saejax.tasks.benchmarks").identity(name, self.configs["task"])
            else:
                mark = importlib.import_module("saejax.tasks.corpora").identity(self.configs[source])
            self._marks[key] = mark
        return self._marks[key]

    def _stream(self) -> str:
        """What training straight from the model depends on beside its own settings."""
        capture = dataclasses.replace(self.configs["capture"], sites=())  # those of training are read
        settings = [
            configuration.identity(config) for config in (self.configs["model"], self.configs["corpus"], capture)
        ]
        return fingerprint([self._source("model", ""), self._source("corpus", ""), settings])


def run_stages(
    stages: Sequence[str],
    configs: Configs,
    workdir: str,
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the units of ``stages``, in order; what is finished and unchanged is left as it is.

    Args:
      stages: names from ``STAGES``.
      configs: every group of configuration.
      workdir: the folder of the run.
      say: prints a line.
      stopping: whether the process was asked to stop.

    Raises:
      UserError: bad input, or a stage's input has not been made.
      Interrupted: asked to stop, and saved.
    """
    for stage in stages:
        one_of(stage, STAGES, "stage")
    workspace, plan = Workspace(workdir), Plan(configs)
    if not any(plan.units(stage) for stage in stages):
        raise UserError(f"{', '.join(stages)} has nothing to do with these settings: --help says what to name")
    with workspace.lock() if configs["mesh"].process_id == 0 else contextlib.nullcontext():  # the first one holds it
        for stage in stages:
            for unit in plan.units(stage):
                if stopping():
                    raise Interrupted(f"stopped before {unit}; what is done is kept: run the same command to go on")
                _run_unit(workspace, plan, unit, say, stopping)


def _run_unit(workspace: Workspace, plan: Plan, unit: str, say: Callable, stopping: Callable) -> None:
    stage, _, name = unit.partition("/")
    mark = plan.mark(unit)
    if workspace.finished(stage, name, mark):
        say(f"{unit}: done before, unchanged")
        return
    inputs = {need: _input_folder(workspace, plan, unit, need) for need in plan.needs(unit)}
    _join_processes(stage, plan.configs)
    folder, found = workspace.begin(stage, name, mark) if _first(plan) else (workspace.folder(stage, name), "")
    if plan.configs["mesh"].processes > 1:  # no process may read what the first one moves away
        importlib.import_module("saejax.parallel").wait_for_all(f"{unit} begun")
    if found and found != "resumed":
        say(f"{unit}: settings or inputs changed; the old result was moved to {found}")
    say(f"{unit}: {'going on' if found == 'resumed' else 'started'}")
    started, clock = now(), time.monotonic()
    module, function = STAGES[stage].function.split(":")
    run = Run(stage, name, folder, plan.configs, inputs, lambda line: say(f"  {unit}: {line}"), stopping)
    results = getattr(importlib.import_module(module), function)(run)
    seconds = round(time.monotonic() - clock, 2)
    if _first(plan):
        summary = _describe(plan, stage, inputs) | dict(start=started, seconds=seconds, results=results)
        workspace.finish(stage, name, mark, summary)
    say(f"{unit}: done in {seconds:.1f} s")


def _describe(plan: Plan, stage: str, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What a summary says of settings, inputs, versions and devices."""
    read = (*STAGES[stage].groups, *STAGES[stage].placement)
    return dict(
        config={group: configuration.to_json(plan.configs[group]) for group in read},
        inputs={need: plan.mark(need) for need in inputs},
        packages=package_versions(),
        devices=_devices(),
        seeds={group: plan.configs[group].seed for group in read if hasattr(plan.configs[group], "seed")},
    )


def _devices() -> dict[str, Any] | None:
    """The devices as JAX sees them; None if the stages so far have not used JAX."""
    if "jax" not in sys.modules:
        return None
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return dict(count=jax.device_count(), kinds=kinds, processes=jax.process_count())


def _first(plan: Plan) -> bool:
    return plan.configs["mesh"].process_id == 0


def _input_folder(workspace: Workspace, plan: Plan, unit: str, need: str) -> Path:
    stage, _, name = need.partition("/")
    if not workspace.finished(stage, name, plan.mark(need)):
        exists = (workspace.folder(stage, name) / SUMMARY).exists()
        state = "was made with other settings" if exists else "has not been made"
        raise UserError(
            f"{unit} reads {need}, which {state} in {workspace.root}: run experiments.{stage} with the same flags first"
        )
    return workspace.folder(stage, name)


def _join_processes(stage: str, configs: Configs) -> None:
    mesh = configs["mesh"]
    if mesh.processes == 1:
        return
    if not STAGES[stage].many_processes:
        able = " and ".join(f"experiments.{name}" for name in STAGES if STAGES[name].many_processes)
        raise UserError(
            f"{stage} runs in one process: run it with --mesh.processes=1, and {able} with {mesh.processes}"
        )
    import jax

    if not jax.distributed.is_initialized():
        from saejax.parallel import start_processes

        start_processes(mesh)
