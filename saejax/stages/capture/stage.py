"""The stages ``tokenize`` and ``capture``."""

from saejax.activations.results import CaptureResults
from saejax.activations.settings import CaptureConfig
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
from saejax.stages import identities
from saejax.stages.capture.run import run_capture
from saejax.tasks.settings import CorpusConfig, TaskConfig

CAPTURE = Stage(
    name="capture",
    summary="records activations of the model at the wanted sites",
    run=run_capture,
    results=CaptureResults,
    groups=(ModelConfig, CorpusConfig, CaptureConfig),
    placement=(MeshConfig, TaskConfig),
    reads=("tokenize",),
    needs=lambda configs, name: identities.training_text(configs),
    identity=dict(model=identities.model, corpus=identities.corpus),
    # --capture.dtype is read in place of the first; the other says which unit is read.
    unread=lambda configs, name: ("model.dtype", "corpus.stream"),
    processes="all",
)
