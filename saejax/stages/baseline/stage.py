"""The stage ``baseline``."""

from saejax.config import Configs
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Stage, inputs_of, settings_of
from saejax.stages import identities
from saejax.stages.baseline.run import run_baseline
from saejax.tasks.own_prompts import read_ioi, read_own_prompts
from saejax.tasks.results import BaselineResults
from saejax.tasks.settings import OF_BENCHMARKS, TaskConfig


def _check(configs: Configs) -> None:
    """Check the files of prompts and words before any model is loaded."""
    read_own_prompts(configs[TaskConfig], None)
    read_ioi(configs[TaskConfig])


BASELINE = Stage(
    name="baseline",
    summary="measures the behaviours: accuracy and logit differences on train and test prompts",
    revision=2,  # gate.json
    run=run_baseline,
    results=BaselineResults,
    groups=(ModelConfig, TaskConfig),
    settings=settings_of(ModelConfig, TaskConfig, but=OF_BENCHMARKS),
    inputs=lambda configs, name: inputs_of(configs, model=identities.model, prompts=identities.prompts),
    processes="items",
    check=_check,
)
