"""The stages ``tokenize`` and ``capture``."""

from saejax.runner.stage import Stage
from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, ModelConfig
from saejax.tasks import identities

TOKENIZE = Stage(
    name="tokenize",
    summary="turns text of any length into token ids on disk, with --corpus.stream=True",
    run="saejax.activations.tokenize:run_tokenize",
    results="saejax.activations.results:TokenizeResults",
    groups=(CorpusConfig,),
    placement=(ModelConfig, CaptureConfig),
    reads=("baseline",),
    needs=lambda configs, name: identities.joining_prompts(configs),
    names=lambda configs: ("",) if configs[CorpusConfig].stream else (),
    identity=dict(model=identities.model, corpus=identities.corpus, bos=lambda configs: configs[CaptureConfig].bos),
)

CAPTURE = Stage(
    name="capture",
    summary="records activations of the model at the wanted sites",
    run="saejax.activations.capture:run_capture",
    results="saejax.activations.results:CaptureResults",
    groups=(ModelConfig, CorpusConfig, CaptureConfig),
    placement=(MeshConfig,),
    reads=("baseline", "tokenize"),
    needs=lambda configs, name: identities.training_text(configs),
    identity=dict(model=identities.model, corpus=identities.corpus),
    programs="saejax.activations.planned:capture_programs",
    # --capture.dtype is read in place of the first; the others say which units are read.
    unread=lambda configs, name: ("model.dtype", "corpus.stream", "corpus.behaviours"),
    processes="all",
)
