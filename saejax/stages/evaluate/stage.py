"""The stage ``evaluate``."""

from saejax.evaluation.results import EvaluateResults
from saejax.evaluation.settings import EvaluateConfig
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
from saejax.stages import identities
from saejax.stages.evaluate.run import run_evaluate
from saejax.stages.train.members import store_and_dictionaries, trained_sites, units_of_members
from saejax.training.settings import TrainConfig

EVALUATE = Stage(
    name="evaluate",
    summary="scores dictionaries on held-out text: fidelity, sparsity, cross-entropy recovered",
    run=run_evaluate,
    results=EvaluateResults,
    groups=(ModelConfig, EvaluateConfig),
    placement=(MeshConfig,),
    reads=("capture", "train"),
    needs=store_and_dictionaries,
    inputs=trained_sites,
    names=lambda configs: configs[TrainConfig].kinds,
    identity=dict(model=identities.model),
    members=units_of_members,
    revision=2,  # dictionaries that normalise tokens are scored with their normalisation
    processes="items",
)
