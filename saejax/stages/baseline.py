"""The stages ``baseline`` and ``benchmark``."""

from saejax.runner.stage import Stage
from saejax.settings import MeshConfig, ModelConfig, TaskConfig
from saejax.tasks import identities

BASELINE = Stage(
    name="baseline",
    summary="measures the behaviours: accuracy and logit differences on train and test prompts",
    run="saejax.tasks.baseline:run_baseline",
    results="saejax.tasks.results:BaselineResults",
    groups=(ModelConfig, TaskConfig),
    placement=(MeshConfig,),
    identity=dict(model=identities.model, prompts=identities.prompts),
    processes="items",
)

BENCHMARK = Stage(
    name="benchmark",
    summary="scores the model on the benchmarks that --task.benchmarks names, if any",
    run="saejax.tasks.benchmark_stage:run_benchmark",
    results="saejax.tasks.results:BenchmarkResults",
    groups=(ModelConfig, TaskConfig),
    placement=(MeshConfig,),
    names=lambda configs: configs[TaskConfig].benchmarks,
    identity=dict(model=identities.model),
    unit_identity=dict(benchmark=identities.benchmark),
    processes="items",
    programs="saejax.tasks.planned:benchmark_programs",
)
