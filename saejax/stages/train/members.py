"""Members of a train unit as units of their own, and the captured sites that they are trained and scored on."""

import dataclasses
from typing import Any

from saejax.activations.joined import single_sites
from saejax.activations.settings import CaptureConfig
from saejax.config import Config, Configs, setting
from saejax.dictionaries.cross_layer import FORMS
from saejax.dictionaries.kinds import PRETRAINED
from saejax.errors import UserError
from saejax.training.members import Member, choose_sites, make_members, target_of
from saejax.training.settings import TrainConfig


@dataclasses.dataclass(frozen=True)
class PlaceConfig(Config):
    """The influence of a stack on a member's result, beside the settings of a run of it alone; "": none."""

    site_seed: str = setting("", "seed of initial values that the name of its site gives, where it is one of several")
    order_seed: str = setting("", "seed of the order of tokens: the first member's")
    init_from: str = setting("", "name of the member that it starts from in --train.init_from")


def place_in_stack(configs: Configs) -> dict[str, str]:
    """Return what a member takes from its stack, by name, given the settings of the member."""
    return {name: value for name, value in vars(configs.get(PlaceConfig) or PlaceConfig()).items() if value}


def units_of_members(configs: Configs, kind: str) -> dict[str, Configs]:
    """Return the members of a train unit as units of their own, by name.

    A member alone has the name "" and the same hash, so that a stack takes a dictionary that was trained before it.

    Args:
      configs: all settings.
      kind: name of the train unit.

    Returns:
      Each member's settings, as of a run of it alone, with its ``PlaceConfig``. Empty for a
      cross-layer transcoder, which is one dictionary, and for pretrained ones, which are copied.

    Raises:
      UserError: as ``make_members`` and ``choose_sites``.
    """
    train = configs[TrainConfig]
    if kind == PRETRAINED or train.form in FORMS:
        return {}
    # A store has the sites that it was asked for, so that members are known before it exists.
    captured = None if train.source == "model" else configs[CaptureConfig].sites
    units = {}
    for size, config in train.each_size().items():
        for member in make_members(config, kind, choose_sites(config, captured), size):
            place = PlaceConfig(
                site_seed=str(member.site_seed or ""),
                order_seed=str(train.seed[0]) if member.settings["seed"] != train.seed[0] else "",
                init_from=member.name if train.init_from else "",
            )
            units[member.name] = configs | _settings_alone(config, kind, member) | place
    return units


def _settings_alone(config: TrainConfig, kind: str, member: Member) -> TrainConfig:
    """Return the settings of a run that trains one member alone."""
    # A user's kind may have a setting with the name of a shared one: a member's value then belongs to the kind's own.
    own_names = {field.name for field in dataclasses.fields(config.of_kind(kind))}
    single = {name: (value,) for name, value in member.settings.items()}
    shared: dict[str, Any] = {name: value for name, value in single.items() if name not in own_names}
    of_kind = {name: value for name, value in single.items() if name in own_names}
    inner = {**config.by_kind, kind: dataclasses.replace(config.of_kind(kind), **of_kind)}
    return dataclasses.replace(config, kinds=(kind,), sites=(member.site,), l1_by_depth=(), by_kind=inner, **shared)


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


def trained_sites(configs: Configs) -> Configs:
    """Return the configuration with the captured sites that dictionaries of this run read, and no others.

    A store's files of a site depend on no other site, so further sites leave dictionaries as they are.
    """
    train, capture = configs[TrainConfig], configs[CaptureConfig]
    if train.sites == ("all",) or PRETRAINED in train.kinds:
        return configs
    read = {part for site in train.sites for part in site.split("+")}
    if train.form != "sae":
        read |= {target_of(train, site) for site in read}
    kept = tuple(site for site in capture.sites if site in read)
    return configs if kept == capture.sites else configs | dataclasses.replace(capture, sites=kept)
