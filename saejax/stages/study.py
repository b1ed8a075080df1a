"""The stage ``study``."""

from saejax.runner.stage import Stage, train_units
from saejax.settings import MeshConfig, ModelConfig, StudyConfig, TaskConfig
from saejax.tasks import identities

STUDY = Stage(
    name="study",
    summary="scores benchmarks without top features, beside matched random ones, if --study.benchmarks names any",
    run="saejax.causal.study.run:run_study",
    results="saejax.causal.study.results:StudyResults",
    groups=(ModelConfig, TaskConfig, StudyConfig),
    placement=(MeshConfig,),
    reads=("train",),
    follows=("ablate",),
    needs=lambda configs, name: train_units(configs[StudyConfig].dictionary),
    names=lambda configs: configs[StudyConfig].benchmarks,
    identity=dict(model=identities.model, dictionary=lambda configs: identities.dictionary(configs, "study")),
    unit_identity=dict(benchmark=identities.benchmark),
    rule="saejax.causal.study.scores:rule",
    processes="items",
    section="saejax.causal.study.report:sections",
)
