"""The stage ``evaluate``."""

from saejax.config import Configs
from saejax.evaluation.results import EvaluateResults
from saejax.evaluation.settings import EvaluateConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages import identities
from saejax.stages.evaluate.run import run_evaluate
from saejax.stages.train.members import store_and_dictionaries, trained_sites, units_of_members
from saejax.training.settings import TrainConfig


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    return inputs_of(trained_sites(configs), *store_and_dictionaries(configs, name), model=identities.model)


EVALUATE = Stage(
    name="evaluate",
    summary="scores dictionaries on held-out text: fidelity, sparsity, cross-entropy recovered",
    run=run_evaluate,
    results=EvaluateResults,
    groups=(ModelConfig, EvaluateConfig),
    reads=("capture", "train"),
    inputs=_inputs,
    names=lambda configs: configs[TrainConfig].kinds,
    members=units_of_members,
    revision=4,  # what opens a message in chats
    processes="items",
)
