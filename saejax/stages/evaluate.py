"""The stage ``evaluate``."""

from saejax.runner.stage import Stage
from saejax.settings import EvaluateConfig, MeshConfig, ModelConfig, TrainConfig
from saejax.tasks import identities

EVALUATE = Stage(
    name="evaluate",
    summary="scores dictionaries on held-out text: fidelity, sparsity, cross-entropy recovered",
    run="saejax.evaluation.evaluate:run_evaluate",
    results="saejax.evaluation.results:EvaluateResults",
    groups=(ModelConfig, EvaluateConfig),
    placement=(MeshConfig,),
    reads=("capture", "train"),
    needs=lambda configs, name: ("capture", f"train/{name}"),
    names=lambda configs: configs[TrainConfig].kinds,
    identity=dict(model=identities.model),
    processes="items",
    programs="saejax.evaluation.planned:evaluate_programs",
)
