"""The stage ``tokenize``."""

from saejax.activations.results import TokenizeResults
from saejax.activations.settings import CaptureConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Stage
from saejax.stages import identities
from saejax.stages.tokenize.run import run_tokenize
from saejax.tasks.settings import CorpusConfig, TaskConfig

TOKENIZE = Stage(
    name="tokenize",
    summary="turns text of any length into token ids on disk, with --corpus.stream=True",
    run=run_tokenize,
    results=TokenizeResults,
    groups=(CorpusConfig,),
    placement=(ModelConfig, CaptureConfig, TaskConfig),
    names=lambda configs: ("",) if configs[CorpusConfig].stream else (),
    identity=dict(model=identities.model, corpus=identities.corpus, bos=lambda configs: configs[CaptureConfig].bos),
)
