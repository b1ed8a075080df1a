"""The stage ``preflight``."""

from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run, fingerprint
from saejax.settings import PreflightConfig
from saejax.tasks import identities


def _shapes(configs: Configs) -> str:
    """Return a hash of the sizes of the models that are checked."""
    from saejax.preflight import shapes

    return shapes.identity(configs)


def _units(configs: Configs) -> str:
    """Return a hash of the names of the units that are asked for."""
    from saejax.runner.registry import STAGES

    return fingerprint([unit for stage in STAGES.values() if not stage.first for unit in stage.units(configs)])


def _run(run: Run) -> Any:
    from saejax.preflight.checks import run_preflight

    return run_preflight(run)


def _results() -> Any:
    from saejax.preflight.results import PreflightResults

    return PreflightResults


PREFLIGHT = Stage(
    name="preflight",
    summary="says what will run, whether it fits, and roughly how long it takes",
    run=_run,
    results=_results,
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
