"""The stage ``train``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from saejax.config import Configs, identity
from saejax.errors import UserError
from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, ModelConfig, TrainConfig
from saejax.settings.kinds import PRETRAINED
from saejax.stage import Stage
from saejax.tasks import identities
from saejax.workspace import fingerprint


def _initial(configs: Configs) -> str:
    """The dictionaries that training starts from."""
    from saejax.dictionaries import stacks

    folder = configs[TrainConfig].init_from
    return stacks.identity(folder) if folder else ""


def _check(configs: Configs) -> None:
    from saejax.models.sites import parse_site, site_parts

    folder, sites = configs[TrainConfig].init_from, configs[TrainConfig].sites
    for site in sites if sites != ("all",) else ():
        for part in site_parts(site):
            parse_site(part)
    if folder and "://" not in folder and not Path(folder).exists():
        raise UserError(f"--train.init_from={folder} does not exist: name the folder of a dictionary")


def _pretrained(configs: Configs, name: str) -> str:
    """The dictionaries that were there already."""
    from saejax.dictionaries import stacks

    return fingerprint([stacks.identity(one) for one in configs[TrainConfig].pretrained]) if name == PRETRAINED else ""


def _stream(configs: Configs) -> str:
    """Model, text and settings of training straight from the model."""
    if configs[TrainConfig].source != "model":
        return ""
    capture = dataclasses.replace(
        configs[CaptureConfig], sites=(), tokens=0
    )  # training reads its own sites, of all text
    settings = [identity(config) for config in (configs[ModelConfig], configs[CorpusConfig], capture)]
    return fingerprint([identities.model(configs), identities.corpus(configs), settings])


def _needs(configs: Configs, name: str) -> Sequence[str]:
    if name == PRETRAINED:
        return ()
    return ("capture",) if configs[TrainConfig].source == "store" else identities.training_text(configs)


TRAIN = Stage(
    name="train",
    summary="trains sparse dictionaries on the captured activations",
    run="saejax.training.train:run_train",
    results="saejax.training.results:TrainResults",
    groups=(TrainConfig,),
    placement=(MeshConfig,),
    after=("capture",),
    needs=_needs,
    names=lambda configs: configs[TrainConfig].kinds,
    identity=dict(initial=_initial, stream=_stream),
    unit_identity=dict(pretrained=_pretrained),
    check=_check,
    cost="saejax.training.cost:train_cost",
    programs="saejax.training.cost:train_programs",
    # 2: what is found in errors reads beside the decoder's bias
    version=lambda configs: 1 if configs[TrainConfig].widen == "random" else 2,
    processes="all",
)
