"""The stage ``tokenize``."""

from typing import Any

from saejax.activations.request import check_limits
from saejax.activations.results import TokenizeResults
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs, counted
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Stage, inputs_of
from saejax.stages import identities
from saejax.stages.tokenize.run import run_tokenize
from saejax.tasks.settings import CorpusConfig, TaskConfig


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    return counted(configs[CorpusConfig]) | {"capture.bos": configs[CaptureConfig].bos}


TOKENIZE = Stage(
    name="tokenize",
    summary="turns text of any length into token ids on disk, with --corpus.stream=True",
    run=run_tokenize,
    results=TokenizeResults,
    groups=(CorpusConfig, ModelConfig, CaptureConfig, TaskConfig),
    settings=_settings,
    inputs=lambda configs, name: inputs_of(configs, model=identities.model, corpus=identities.corpus),
    check=check_limits,
    names=lambda configs: ("",) if configs[CorpusConfig].stream else (),
)
