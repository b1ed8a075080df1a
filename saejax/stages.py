"""What stages there are, what each reads, and what it needs.

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

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
