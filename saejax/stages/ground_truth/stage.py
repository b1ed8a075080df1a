"""The stage ``ground_truth``."""

from collections.abc import Sequence

from saejax.config import Configs, identity
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.files import fingerprint
from saejax.ground_truth.results import TruthResults
from saejax.ground_truth.settings import CONTROLS, TruthConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
from saejax.stages.ground_truth.report import sections
from saejax.stages.ground_truth.run import run_ground_truth
from saejax.training.settings import TrainConfig


def _names(configs: Configs) -> Sequence[str]:
    return (*configs[TrainConfig].kinds, CONTROLS) if configs[TruthConfig].features else ()


def _initial(configs: Configs) -> str:
    """Return the identity of the dictionaries that training starts from; "" without any."""
    folder = configs[TrainConfig].init_from if configs[TruthConfig].features else ""
    return hash_dictionaries(folder) if folder else ""


def _of_controls(configs: Configs, name: str) -> str:
    """Return a hash of the settings of the controls' kind, which the name of their unit does not tell."""
    train = configs[TrainConfig]
    return fingerprint(identity(train, train.kinds[0]) | dict(kind=train.kinds[0])) if name == CONTROLS else ""


GROUND_TRUTH = Stage(
    name="ground_truth",
    summary="trains dictionaries on a synthetic world whose features are known, and says which of them they find",
    run=run_ground_truth,
    results=TruthResults,
    groups=(TruthConfig, TrainConfig),
    makes_model=True,
    placement=(MeshConfig,),
    names=_names,
    identity=dict(initial=_initial),
    unit_identity=dict(controls=_of_controls),
    section=sections,
    revision=2,  # one control: the frozen decoder
)
