"""Members of a train unit as units of their own, and the captured sites that they are trained and scored on."""

import dataclasses
from typing import Any

from saejax.activations.joined import single_sites
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs
from saejax.dictionaries.kinds.settings import PRETRAINED
from saejax.errors import UserError
from saejax.runner.stage import UnitMember
from saejax.training.members import Member, choose_sites, make_members
from saejax.training.settings import TrainConfig


def units_of_members(configs: Configs, kind: str) -> dict[str, UnitMember]:
    """Return the members of a train unit as units of their own, by name.

    A member alone has the name "" and the same hash, so that a stack takes a dictionary that was trained before it.

    Args:
      configs: all settings.
      kind: name of the train unit.

    Returns:
      Each member's settings, as of a run of it alone, and what else its result depends on: whether its site is one of
      several, the seed of the order of tokens, and the dictionary that it starts from. Empty for a
      cross-layer transcoder, which is one dictionary, and for pretrained ones, which are copied.

    Raises:
      UserError: as ``make_members`` and ``choose_sites``.
    """
    train = configs[TrainConfig]
    if kind == PRETRAINED or train.form == "cross_layer_transcoder":
        return {}
    # A store has the sites that it was asked for, so that members are known before it exists.
    captured = None if train.source == "model" else configs[CaptureConfig].sites
    units = {}
    for config in train.each_expansion():
        for member in make_members(config, kind, choose_sites(config, captured)):
            # Nothing is added where it is what a run of this member alone would have.
            seed, sources = member.settings["seed"], {}
            if member.site_seed:
                sources["site_seed"] = str(member.site_seed)
            if seed != train.seed[0]:
                sources["order_seed"] = str(train.seed[0])
            if train.init_from and member.name:
                sources["init_from"] = member.name
            units[member.name] = UnitMember(configs | _settings_alone(config, kind, member), sources)
    return units


def _settings_alone(config: TrainConfig, kind: str, member: Member) -> TrainConfig:
    """Return the settings of a run that trains one member alone."""
    fields = {field.name for field in dataclasses.fields(config)}
    single = {name: (value,) for name, value in member.settings.items()}
    shared: dict[str, Any] = {name: value for name, value in single.items() if name in fields}
    of_kind = {name: value for name, value in single.items() if name not in fields}
    inner = {**config.by_kind, kind: dataclasses.replace(config.of_kind(kind), **of_kind)}
    return dataclasses.replace(
        config, kinds=(kind,), sites=(member.site,), expansions=(), l1_by_depth=(), by_kind=inner, **shared
    )


def store_and_dictionaries(configs: Configs, kind: str) -> tuple[str, str]:
    """Return the units that a stage reads that scores the dictionaries of a train unit on stored activations.

    Raises:
      UserError: training reads a site straight from the model that will not be in the store.
    """
    train, captured = configs[TrainConfig], configs[CaptureConfig].sites
    if train.source == "model" and kind != PRETRAINED:
        members = make_members(train, kind, choose_sites(train, None))
        read = single_sites(site for member in members for site in (member.site, member.target))
        if missing := [site for site in read if site not in captured]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"train/{kind} is scored on stored activations of {missing[0]}{more}, which "
                f"--capture.sites={','.join(captured)} leaves out: add them, or run the stages that need no store"
            )
    return "capture", f"train/{kind}"


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
