"""The stages ``baseline`` and ``benchmark``."""

from typing import Any

from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, TaskConfig
from saejax.tasks import identities


def _run_baseline(run: Run) -> Any:
    from saejax.tasks.baseline import run_baseline

    return run_baseline(run)


def _results_baseline() -> Any:
    from saejax.tasks.results import BaselineResults

    return BaselineResults


BASELINE = Stage(
    name="baseline",
    summary="measures the behaviours: accuracy and logit differences on train and test prompts",
    run=_run_baseline,
    results=_results_baseline,
    groups=(ModelConfig, TaskConfig),
    placement=(MeshConfig,),
    identity=dict(model=identities.model, prompts=identities.prompts),
    processes="items",
)


def _run_benchmark(run: Run) -> Any:
    from saejax.tasks.benchmark_scores import run_benchmark

    return run_benchmark(run)


def _results_benchmark() -> Any:
    from saejax.tasks.results import BenchmarkResults

    return BenchmarkResults


BENCHMARK = Stage(
    name="benchmark",
    summary="scores the model on the benchmarks that --task.benchmarks names, if any",
    run=_run_benchmark,
    results=_results_benchmark,
    groups=(ModelConfig, TaskConfig),
    placement=(MeshConfig,),
    names=lambda configs: configs[TaskConfig].benchmarks,
    identity=dict(model=identities.model),
    unit_identity=dict(benchmark=identities.benchmark),
    revision=2,  # number bases in more spellings
    processes="items",
)
