"""The stage ``train``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from saejax.activations.settings import CaptureConfig
from saejax.config import Configs, identity
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.kinds.settings import KIND_SETTINGS, PRETRAINED
from saejax.errors import UserError
from saejax.files import fingerprint
from saejax.models.sites import parse_site, site_parts
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
from saejax.stages import identities
from saejax.stages.train.members import trained_sites, units_of_members
from saejax.stages.train.run import run_train
from saejax.tasks.settings import CorpusConfig
from saejax.training.results import TrainResults
from saejax.training.settings import TrainConfig

_OF_STORES = ("sites", "tokens", "shard_rows", "max_sink_share")  # settings of --capture that only stores have


def _initial(configs: Configs) -> str:
    """Return the identity of the dictionaries that training starts from; "" without any."""
    folder = configs[TrainConfig].init_from
    return hash_dictionaries(folder) if folder else ""


def _check(configs: Configs) -> None:
    folder, sites = configs[TrainConfig].init_from, configs[TrainConfig].sites
    for site in sites if sites != ("all",) else ():
        for part in site_parts(site):
            parse_site(part)
    if folder and "://" not in folder and not Path(folder).exists():
        raise UserError(f"--train.init_from={folder} does not exist: name the folder of a dictionary")


def _pretrained(configs: Configs, name: str) -> str:
    """Return the identity of the dictionaries that were trained elsewhere."""
    if name != PRETRAINED:
        return ""
    return fingerprint([hash_dictionaries(address) for address in configs[TrainConfig].pretrained])


def _stream(configs: Configs) -> str:
    """Return a hash of model, text and settings of training straight from the model; "" with a store."""
    if configs[TrainConfig].source != "model":
        return ""
    capture = identity(configs[CaptureConfig])
    # Training reads its own sites, of all text, and writes no shards, whose sinks are counted.
    read = {name: value for name, value in capture.items() if name not in _OF_STORES}
    settings = [identity(configs[CorpusConfig]), read]
    return fingerprint([identities.model(configs), identities.corpus(configs), settings])


def _needs(configs: Configs, name: str) -> Sequence[str]:
    if name == PRETRAINED:
        return ()
    return ("capture",) if configs[TrainConfig].source == "store" else identities.training_text(configs)


def _unread(configs: Configs, name: str) -> Sequence[str]:
    """Return the settings that training reads only where others ask for it."""
    config = configs[TrainConfig]
    if name == PRETRAINED:
        return [f"train.{field.name}" for field in dataclasses.fields(config)]
    # Kinds that keep the k largest have no penalty; a plugin's may have one.
    penalised = name not in KIND_SETTINGS or "k" not in KIND_SETTINGS[name].reads or bool(KIND_SETTINGS[name].source)
    conditions = {
        "auxk_features": config.auxk > 0,
        "resample_from": config.resample_every > 0,
        "penalty_warmup": penalised,
        "expansion": not (config.expansions or config.features),
        "features": not config.expansions,
    }
    return [f"train.{field}" for field, is_read in conditions.items() if not is_read]


TRAIN = Stage(
    name="train",
    summary="trains sparse dictionaries on the captured activations",
    run=run_train,
    results=TrainResults,
    groups=(TrainConfig,),
    placement=(MeshConfig,),
    reads=("tokenize", "capture"),
    needs=_needs,
    inputs=trained_sites,
    names=lambda configs: configs[TrainConfig].kinds,
    identity=dict(initial=_initial, stream=_stream),
    unit_identity=dict(pretrained=_pretrained),
    check=_check,
    members=units_of_members,
    unread=_unread,
    processes="all",
)
