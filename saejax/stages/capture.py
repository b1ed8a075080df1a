"""The stages ``tokenize`` and ``capture``."""

from typing import Any

from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig
from saejax.tasks import identities


def _run_tokenize(run: Run) -> Any:
    from saejax.activations.tokenize import run_tokenize

    return run_tokenize(run)


def _results_tokenize() -> Any:
    from saejax.activations.results import TokenizeResults

    return TokenizeResults


TOKENIZE = Stage(
    name="tokenize",
    summary="turns text of any length into token ids on disk, with --corpus.stream=True",
    run=_run_tokenize,
    results=_results_tokenize,
    groups=(CorpusConfig,),
    placement=(ModelConfig, CaptureConfig, TaskConfig),
    names=lambda configs: ("",) if configs[CorpusConfig].stream else (),
    identity=dict(model=identities.model, corpus=identities.corpus, bos=lambda configs: configs[CaptureConfig].bos),
)


def _run_capture(run: Run) -> Any:
    from saejax.activations.capture import run_capture

    return run_capture(run)


def _results_capture() -> Any:
    from saejax.activations.results import CaptureResults

    return CaptureResults


CAPTURE = Stage(
    name="capture",
    summary="records activations of the model at the wanted sites",
    run=_run_capture,
    results=_results_capture,
    groups=(ModelConfig, CorpusConfig, CaptureConfig),
    placement=(MeshConfig, TaskConfig),
    reads=("tokenize",),
    needs=lambda configs, name: identities.training_text(configs),
    identity=dict(model=identities.model, corpus=identities.corpus),
    # --capture.dtype is read in place of the first; the other says which unit is read.
    unread=lambda configs, name: ("model.dtype", "corpus.stream"),
    processes="all",
)
