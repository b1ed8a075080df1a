"""The stage ``capture``."""

from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, ModelConfig
from saejax.stage import Stage
from saejax.tasks import identities

CAPTURE = Stage(
    name="capture",
    summary="records activations of the model at the wanted sites",
    run="saejax.activations.capture:run_capture",
    results="saejax.activations.results:CaptureResults",
    groups=(ModelConfig, CorpusConfig, CaptureConfig),
    placement=(MeshConfig,),
    after=("baseline",),
    needs=lambda configs, name: ("baseline",) if configs["task"].has_behaviours else (),
    identity=dict(model=identities.model, corpus=identities.corpus),
    cost="saejax.activations.cost:capture_cost",
    programs="saejax.activations.cost:capture_programs",
    many_processes=True,
)
