"""The stage ``preflight``."""

from typing import Any

from saejax.config import Configs, counted, group_name, to_json
from saejax.files import fingerprint
from saejax.preflight import shapes
from saejax.preflight.results import PreflightResults
from saejax.runner.registry import all_stages
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages import identities
from saejax.stages.preflight.needs import describe_needs
from saejax.stages.preflight.run import recall_long_run, run_preflight
from saejax.stages.preflight.settings import PreflightConfig
from saejax.training.settings import TrainConfig

#: Settings of any group that change no result, but how much memory and time programs take.
_SIZES = ("batch", "batch_rows", "batch_tokens", "members_at_once", "zero_optimizer")


def _shapes(configs: Configs) -> str:
    """Return a hash of the sizes of the models that are checked."""
    return shapes.identity(configs)


def _units(configs: Configs) -> str:
    """Return a hash of the names of the units that are asked for."""
    return fingerprint([unit for stage in all_stages().values() if not stage.first for unit in stage.units(configs)])


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings of all stages and of the mesh, of k and l1 their number where programs are the same."""
    train = configs[TrainConfig]
    groups = {group_name(type(config)): to_json(config) for config in configs}
    sizes = {f"{group}.{name}": data[name] for group, data in groups.items() for name in _SIZES if name in data}
    members: dict[str, Any] = {"train.k": len(train.k), "train.l1": len(train.l1)}
    if "matching_pursuit" in train.kinds:
        members["train.k"] = list(train.k)  # its program takes k steps
    # Of kinds that are not trained nothing is read: which others there are depends on the plugins of a process.
    of_kinds = tuple(f"train.{kind}." for kind in train.kinds)
    values = {
        name: value
        for name, value in counted(*configs).items()
        if not name.startswith("train.") or name.count(".") == 1 or name.startswith(of_kinds)
    }
    return values | sizes | members


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
    foresee=describe_needs,
    recall=recall_long_run,
)
