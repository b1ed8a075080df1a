"""The members of a stack: one dictionary for every site and combination of the swept settings.

Each of them is a unit of its own (``units_of_members``): its result depends on its settings as if it were alone.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.dictionaries.cross_layer import FORMS
from saejax.dictionaries.kinds import KINDS
from saejax.errors import UserError
from saejax.models.sites import ALL_KINDS, ModuleSite, is_joined, site_parts
from saejax.models.sites import KINDS as SITE_KINDS
from saejax.training.settings import TrainConfig


@dataclasses.dataclass(frozen=True)
class Member:
    """One dictionary of a stack."""

    name: str  #: its site and swept settings, such as "resid_post.15-k32"; "" if it is alone
    kind: str  #: kind of the dictionary
    #: site and target: its input and its target; the same for an SAE.
    site: str
    target: str
    #: its values of the settings that can be swept: "learning_rate", "seed" and its kind's settings.
    settings: Mapping[str, Any]
    #: folded into its seed, from which its initial values are drawn: of one site among several the hash of its name, so
    #: that a further site changes no other; the layer in a cross-layer transcoder; 0 where all members have one site.
    site_seed: int = 0


def make_members(config: TrainConfig, kind: str, sites: Sequence[str], size: str = "") -> list[Member]:
    """Return a member for every site and combination of the swept settings.

    Args:
      config: settings with one number of features, as from ``each_size``.
      kind: kind of the dictionaries.
      sites: sites that they read.
      size: the name of that number there.

    Raises:
      UserError: a transcoder's target does not follow its site, ``l1_by_depth`` does not have three values, or two
        members are the same.
    """
    # A name holds only what differs between members, so that names in a plain run stay short.
    lists = swept_settings(config, kind)
    swept = [name for name, values in lists.items() if len(values) > 1]
    depth_l1 = _l1_by_depth(config, kind, sites)
    members = []
    for index, site in enumerate(sites):
        of_site = index if config.form in FORMS else zlib.crc32(site.encode()) & 0x7FFFFFFF if len(sites) > 1 else 0
        for values in itertools.product(*lists.values()):
            settings = dict(zip(lists, values, strict=True))
            parts = [site] if len(sites) > 1 else []
            parts += [size] if size else []
            parts += [f"{name}{settings[name]}" if name == "seed" else f"{name}{settings[name]:g}" for name in swept]
            settings |= depth_l1.get(site, {})
            members.append(Member("-".join(parts), kind, site, target_of(config, site), settings, of_site))
    names = [member.name for member in members]
    if len(set(names)) < len(members):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the stack has two members {twice or 'with the same settings'}: name each value once")
    return members


def swept_settings(config: TrainConfig, kind: str) -> dict[str, tuple[Any, ...]]:
    """Return the values of each setting that can be swept and that a kind reads, in the order of members' names."""
    read = ("learning_rate", "seed", *KINDS[kind].reads)
    fields = {field.name: field for field in dataclasses.fields(config)}
    kind_config = config.of_kind(kind)
    return {name: getattr(config, name) for name in read if fields[name].metadata["swept"]} | {
        field.name: getattr(kind_config, field.name)
        for field in dataclasses.fields(kind_config)
        if field.metadata["swept"]
    }


def target_of(config: TrainConfig, site: str) -> str:
    """Return what a dictionary that reads a site rebuilds: the site, or a transcoder's target in the same layer.

    Raises:
      UserError: the target is not computed after the site.
    """
    if config.form == "sae":
        return site
    kind, _, layer = site.partition(".")
    later = ALL_KINDS[ALL_KINDS.index(kind) + 1 :] if kind in ALL_KINDS and not is_joined(site) else ()
    if config.target not in later:
        raise UserError(
            f"a transcoder predicts what its layer computes after the site that it reads, and --train.target="
            f"{config.target} does not follow {site} of --train.sites: name sites such as mlp_in.L, or another target"
        )
    return f"{config.target}.{layer}"


def _l1_by_depth(config: TrainConfig, kind: str, sites: Sequence[str]) -> dict[str, dict[str, float]]:
    if "l1" not in KINDS[kind].reads or not config.l1_by_depth:
        return {}
    if len(config.l1_by_depth) != 3 or len(config.l1) > 1:
        raise UserError("--train.l1_by_depth takes three values (early, middle, late), and no list in --train.l1")
    for site in sites:
        if ModuleSite.names(site) or is_joined(site):
            raise UserError(f"--train.l1_by_depth goes by layers, and {site} does not name one: use --train.l1")
    # Thirds of the trained layers, not of the model: a stack of late layers has early ones, too.
    layers = sorted({int(site.rpartition(".")[2]) for site in sites})
    third = {layer: min(3 * rank // len(layers), 2) for rank, layer in enumerate(layers)}
    return {site: dict(l1=config.l1_by_depth[third[int(site.rpartition(".")[2])]]) for site in sites}


def choose_sites(config: TrainConfig, captured: Sequence[str] | None) -> list[str]:
    """Return the sites that ``--train.sites`` names; "all" are the sites of one kind, in order of layers.

    Args:
      config: the settings.
      captured: sites of the store; None with ``--train.source=model``, where any site can be read and "all" has no
        meaning.

    Raises:
      UserError: no site is named, or one that is not captured.
    """
    if captured is None:
        if not config.sites or config.sites == ("all",):
            raise UserError(f"--train.sites={','.join(config.sites)} with --train.source=model: name the sites to read")
        return list(config.sites)
    if config.sites == ("all",):
        kinds = {site.partition(".")[0] for site in captured} & set(SITE_KINDS)
        kind = kinds.pop() if len(kinds) == 1 else "resid_post"
        kind = "mlp_in" if config.form != "sae" else kind
        sites = [site for site in captured if site.partition(".")[0] == kind]
        if not sites:
            raise UserError(f"the store has no {kind} sites for --train.sites=all: it has {', '.join(captured)}")
        return sorted(sites, key=lambda site: int(site.rpartition(".")[2]))
    if not config.sites:
        raise UserError("--train.sites is empty: name at least one captured site, such as resid_post.15")
    for part in dict.fromkeys(part for site in config.sites for part in site_parts(site)):
        if part not in captured:
            raise UserError(
                f"{part} of --train.sites is no site in this store, which has {', '.join(captured)}: capture it, too "
                f"(--capture.sites={','.join((*captured, part))})"
            )
    return list(config.sites)
