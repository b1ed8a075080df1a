"""The stage ``preflight``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.files import fingerprint
from saejax.preflight import shapes
from saejax.preflight.results import PreflightResults
from saejax.runner.registry import all_stages
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages import identities
from saejax.stages.preflight.run import run_preflight
from saejax.stages.preflight.settings import PreflightConfig
from saejax.training.settings import TrainConfig


def _shapes(configs: Configs) -> str:
    """Return a hash of the sizes of the models that are checked."""
    return shapes.identity(configs)


def _units(configs: Configs) -> str:
    """Return a hash of the names of the units that are asked for."""
    return fingerprint([unit for stage in all_stages().values() if not stage.first for unit in stage.units(configs)])


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings of all stages and of the mesh; of those that only some kinds read the number of members."""
    train = configs[TrainConfig]
    return counted(*configs) | {"train.k": len(train.k), "train.l1": len(train.l1)}


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    return inputs_of(configs, shapes=_shapes, units=_units, corpus=identities.corpus, prompts=identities.prompts)


PREFLIGHT = Stage(
    name="preflight",
    summary="says what will run, whether it fits, and roughly how long it takes",
    run=run_preflight,
    results=PreflightResults,
    groups=(PreflightConfig,),
    first=True,
    needs_decoder=True,
    settings=_settings,
    inputs=_inputs,
)
