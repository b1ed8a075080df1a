"""The stage ``preflight``."""

from saejax.config import Configs
from saejax.files import fingerprint
from saejax.preflight import shapes
from saejax.preflight.results import PreflightResults
from saejax.runner.registry import all_stages
from saejax.runner.stage import Stage
from saejax.stages import identities
from saejax.stages.preflight.run import run_preflight
from saejax.stages.preflight.settings import PreflightConfig


def _shapes(configs: Configs) -> str:
    """Return a hash of the sizes of the models that are checked."""
    return shapes.identity(configs)


def _units(configs: Configs) -> str:
    """Return a hash of the names of the units that are asked for."""
    return fingerprint([unit for stage in all_stages().values() if not stage.first for unit in stage.units(configs)])


PREFLIGHT = Stage(
    name="preflight",
    summary="says what will run, whether it fits, and roughly how long it takes",
    run=run_preflight,
    results=PreflightResults,
    groups=(PreflightConfig,),
    reads_all=True,
    first=True,
    needs_decoder=True,
    identity=dict(
        shapes=_shapes,
        corpus=identities.corpus,
        prompts=identities.prompts,
        units=_units,
    ),
)
