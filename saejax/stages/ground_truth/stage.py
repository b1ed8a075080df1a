"""The stage ``ground_truth``."""

from collections.abc import Sequence
from typing import Any

from saejax.config import Configs, counted
from saejax.dictionaries.formats.place import is_address
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.kinds import PRETRAINED
from saejax.errors import UserError
from saejax.ground_truth.results import TruthResults
from saejax.ground_truth.settings import CONTROLS, TruthConfig
from saejax.runner.stage import Stage, inputs_of
from saejax.stages.ground_truth.report import sections
from saejax.stages.ground_truth.run import run_ground_truth
from saejax.training.settings import TrainConfig


def _names(configs: Configs) -> Sequence[str]:
    return (*_kinds(configs), CONTROLS) if configs[TruthConfig].features else ()


def _kinds(configs: Configs) -> list[str]:
    """Return the kinds that are trained on the world; dictionaries from elsewhere are of no synthetic world."""
    kinds = [kind for kind in configs[TrainConfig].kinds if kind != PRETRAINED]
    if not kinds:
        raise UserError(
            f"--train.kinds={PRETRAINED} trains nothing on a synthetic world: name a kind, or leave out "
            "--truth.features"
        )
    return kinds


def _initial(configs: Configs) -> str:
    """Return the identity of the dictionaries that training starts from; "" without any."""
    folder = configs[TrainConfig].init_from if configs[TruthConfig].features else ""
    return hash_dictionaries(folder) if folder else ""


def _places(configs: Configs) -> dict[str, list[str]]:
    folder = configs[TrainConfig].init_from
    return {"train.init_from": [folder] if folder and not is_address(folder) else []}


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings that are read; the name of the unit of controls does not tell their kind."""
    train = configs[TrainConfig]
    kind = _kinds(configs)[0] if name == CONTROLS else name
    read = train.read_by(kind) | {"train.kinds": [kind]}
    # The world takes the place of a model's sites and of stored rows, which are shuffled by windows.
    of_models = ("train.sites", "train.source", "train.buffer_rows")
    return counted(configs[TruthConfig]) | {name: value for name, value in read.items() if name not in of_models}


GROUND_TRUTH = Stage(
    name="ground_truth",
    summary="trains dictionaries on a synthetic world whose features are known, and says which of them they find",
    run=run_ground_truth,
    results=TruthResults,
    groups=(TruthConfig, TrainConfig),
    makes_model=True,
    names=_names,
    settings=_settings,
    inputs=lambda configs, name: inputs_of(configs, initial=_initial),
    places=_places,
    section=sections,
    revision=2,  # one control: the frozen decoder
)
