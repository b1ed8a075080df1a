"""The stage ``benchmark``."""

from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
from saejax.stages import identities
from saejax.stages.benchmark.run import run_benchmark
from saejax.tasks.results import BenchmarkResults
from saejax.tasks.settings import TaskConfig

BENCHMARK = Stage(
    name="benchmark",
    summary="scores the model on the benchmarks that --task.benchmarks names, if any",
    run=run_benchmark,
    results=BenchmarkResults,
    groups=(ModelConfig, TaskConfig),
    placement=(MeshConfig,),
    names=lambda configs: configs[TaskConfig].benchmarks,
    identity=dict(model=identities.model),
    unit_identity=dict(benchmark=identities.benchmark),
    revision=3,  # questions beside prompts
    processes="items",
)
