"""The stage ``capture``."""

from saejax.activations.request import check_limits
from saejax.activations.results import CaptureResults
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, settings_of
from saejax.stages import identities
from saejax.stages.capture.run import run_capture
from saejax.tasks.settings import CorpusConfig, TaskConfig
from saejax.tasks.text_sources import text_sources


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    text = identities.training_text(configs)
    return inputs_of(configs, *text, model=identities.model, corpus=identities.corpus)


def _check(configs: Configs) -> None:
    """Raise a ``UserError`` if a file of text is missing, or what is wanted is beyond the model."""
    text_sources(configs[CorpusConfig], configs[TaskConfig])
    check_limits(configs, configs[CaptureConfig].sites)


CAPTURE = Stage(
    name="capture",
    summary="records activations of the model at the wanted sites",
    run=run_capture,
    results=CaptureResults,
    groups=(ModelConfig, CorpusConfig, CaptureConfig, TaskConfig),
    # --capture.dtype is read in place of the first; the other says which unit is read.
    settings=settings_of(ModelConfig, CorpusConfig, CaptureConfig, but=("model.dtype", "corpus.stream")),
    reads=("tokenize",),
    inputs=_inputs,
    check=_check,
    processes="all",
)
