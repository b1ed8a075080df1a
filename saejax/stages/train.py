"""The stage ``train``."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.runner.config import Configs, identity
from saejax.runner.stage import Stage, UnitMember
from saejax.runner.workspace import Run, fingerprint
from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, TrainConfig
from saejax.settings.kinds import KIND_SETTINGS, PRETRAINED
from saejax.tasks import identities


def _initial(configs: Configs) -> str:
    """Return the identity of the dictionaries that training starts from; "" without any."""
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
    """Return the identity of the dictionaries that were trained elsewhere."""
    from saejax.dictionaries import stacks

    if name != PRETRAINED:
        return ""
    return fingerprint([stacks.identity(address) for address in configs[TrainConfig].pretrained])


def _stream(configs: Configs) -> str:
    """Return a hash of model, text and settings of training straight from the model; "" with a store."""
    if configs[TrainConfig].source != "model":
        return ""
    # Training reads its own sites, of all text.
    capture = dataclasses.replace(configs[CaptureConfig], sites=(), tokens=0)
    settings = [identity(config) for config in (configs[CorpusConfig], capture)]
    return fingerprint([identities.model(configs), identities.corpus(configs), settings])


def _needs(configs: Configs, name: str) -> Sequence[str]:
    if name == PRETRAINED:
        return ()
    return ("capture",) if configs[TrainConfig].source == "store" else identities.training_text(configs)


def trained_sites(configs: Configs, name: str = "") -> Configs:
    """Return the configuration with the captured sites that dictionaries of this run read, and no others.

    A store's files of a site depend on no other site, so further sites leave dictionaries as they are.

    Args:
      configs: all settings.
      name: name of the unit, which does not matter.
    """
    train, capture = configs[TrainConfig], configs[CaptureConfig]
    if train.sites == ("all",) or PRETRAINED in train.kinds:
        return configs
    read = {part for site in train.sites for part in site.split("+")}
    if train.form != "sae":
        read |= {site.replace("mlp_in", "mlp_out") for site in read}
    kept = tuple(site for site in capture.sites if site in read)
    return configs if kept == capture.sites else configs | dataclasses.replace(capture, sites=kept)


def train_members(configs: Configs, name: str) -> Mapping[str, UnitMember]:
    """Return the members of a train unit, which are units of their own, and so are their scores."""
    from saejax.training.members import units_of_members

    return units_of_members(configs, name)


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


def _run(run: Run) -> Any:
    from saejax.training.train import run_train

    return run_train(run)


def _results() -> Any:
    from saejax.training.results import TrainResults

    return TrainResults


TRAIN = Stage(
    name="train",
    summary="trains sparse dictionaries on the captured activations",
    run=_run,
    results=_results,
    groups=(TrainConfig,),
    placement=(MeshConfig,),
    reads=("tokenize", "capture"),
    needs=_needs,
    inputs=trained_sites,
    names=lambda configs: configs[TrainConfig].kinds,
    identity=dict(initial=_initial, stream=_stream),
    unit_identity=dict(pretrained=_pretrained),
    check=_check,
    members=train_members,
    unread=_unread,
    processes="all",
)
