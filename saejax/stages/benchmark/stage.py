"""The stage ``benchmark``."""

from saejax.config import Configs
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, settings_of
from saejax.stages import identities
from saejax.stages.benchmark.run import run_benchmark
from saejax.tasks.benchmarks import check_items
from saejax.tasks.results import BenchmarkResults
from saejax.tasks.settings import OF_BEHAVIOURS, TaskConfig


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    return inputs_of(configs, model=identities.model, benchmark=identities.benchmark(name))


def _check(configs: Configs) -> None:
    """Check the rows of local files before any model is loaded."""
    check_items(configs[TaskConfig].benchmarks, configs[TaskConfig])


BENCHMARK = Stage(
    name="benchmark",
    summary="scores the model on the benchmarks that --task.benchmarks names, if any",
    run=run_benchmark,
    results=BenchmarkResults,
    groups=(ModelConfig, TaskConfig),
    settings=settings_of(ModelConfig, TaskConfig, but=OF_BEHAVIOURS),
    inputs=_inputs,
    names=lambda configs: configs[TaskConfig].benchmarks,
    revision=7,  # judges of answers know signs of Unicode, and thousands separators of LaTeX and percentages
    processes="items",
    check=_check,
)
