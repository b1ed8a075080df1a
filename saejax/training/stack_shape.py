"""What the members of a stack have in common: the sites they read, their shape, and what a mesh must divide."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from saejax.activations.batches import Parts
from saejax.activations.joined import single_sites
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.kinds import by_name
from saejax.errors import UserError, one_of
from saejax.models.sites import KINDS as SITE_KINDS
from saejax.models.sites import site_parts
from saejax.settings import TrainConfig
from saejax.training.members import Member
from saejax.training.scales import ScaledRows


def chosen_sites(config: TrainConfig, captured: Sequence[str]) -> list[str]:
    """The sites that ``--train.sites`` names, all of them captured; "all" are those of one kind, in order of layers."""
    if config.sites == ("all",):
        reads = "mlp_in" if config.form != "sae" else None
        kinds = {site.partition(".")[0] for site in captured} & set(SITE_KINDS)
        kind = reads or (kinds.pop() if len(kinds) == 1 else "resid_post")
        found = [site for site in captured if site.partition(".")[0] == kind]
        if not found:
            raise UserError(f"the store has no {kind} sites for --train.sites=all: it has {', '.join(captured)}")
        return sorted(found, key=lambda site: int(site.rpartition(".")[2]))
    if not config.sites:
        raise UserError("--train.sites is empty: name at least one captured site, such as resid_post.15")
    for site in single_sites(config.sites):
        one_of(site, captured, "site in this store (--train.sites)")
    return list(config.sites)


def named_sites(config: TrainConfig) -> list[str]:
    """The sites that ``--train.sites`` names where there is no store to tell which there are."""
    if not config.sites or config.sites == ("all",):
        raise UserError(f"--train.sites={','.join(config.sites)} with --train.source=model: name the sites to read")
    return list(config.sites)


def batch_parts(stack: Sequence[Member]) -> Parts:
    """The sites of each part of a batch: of the inputs, and of the targets if these are not the same."""
    pairs = list(dict.fromkeys((member.site, member.target) for member in stack))
    inputs, targets = zip(*pairs, strict=True)
    return (inputs,) if inputs == targets else (inputs, targets)


def describe_stack(config: TrainConfig, kind: str, store: ScaledRows, stack: Sequence[Member]) -> DictionaryConfig:
    """What the members have in common, with the largest of their k and the model of the store."""
    sites = single_sites(site for member in stack for site in (member.site, member.target))
    widths = {site: store.d(one_of(site, store.sites, "site in this store")) for site in sites}
    return dataclasses.replace(
        stack_shape(config, kind, stack, widths),
        max_norm=store.max_norm(stack[0].site),
        model=store.model.name,
        revision=store.model.revision,
        fingerprint=store.model.fingerprint,
        bos=getattr(store, "bos", "auto"),  # synthetic vectors are of no text
    )


def stack_shape(config: TrainConfig, kind: str, stack: Sequence[Member], widths: Mapping[str, int]) -> DictionaryConfig:
    """What the members have in common before there are activations.

    Args:
      widths: of all their sites, and of the parts of joined ones.

    Raises:
      UserError: their sites differ in width, k or the groups do not fit the features, or two settings exclude each
        other.
    """
    sites = dict.fromkeys(site for member in stack for site in (member.site, member.target))
    shapes = {site: tuple(widths[part] for part in site_parts(site)) for site in sites}
    if len(set(shapes.values())) > 1:
        told = {site: shape if len(shape) > 1 else shape[0] for site, shape in shapes.items()}
        raise UserError(f"the sites of a stack must have one width, but have {told}: train them in several runs")
    shape = next(iter(shapes.values()))
    d_in = sum(shape)
    features = config.features_of(d_in)
    made = by_name(kind)
    each = [made.facts(member.settings, config.of_kind(kind), features) for member in stack]
    facts = max(each, key=lambda facts: facts.get("k", 0))
    if facts.get("k", 0) > features:
        raise UserError(f"--train.k={facts['k']} is more than the {features} features: lower it")
    if config.auxk and config.auxk_features > features:
        raise UserError(f"--train.auxk_features={config.auxk_features} is more than the {features} features: lower it")
    if made.no_free_decoder and config.decoder_norm == "free":
        raise UserError(f"--train.decoder_norm=free {made.no_free_decoder}: use unit")
    if config.resample_every and config.freeze != "none":
        raise UserError(f"--train.resample_every replaces what --train.freeze={config.freeze} keeps: use one of them")
    if config.widen != "random" and (not config.init_from or config.form != "sae"):
        raise UserError(
            f"--train.widen={config.widen} looks for what the SAE of --train.init_from={config.init_from} lacks, with "
            f"--train.form={config.form}: name an SAE, or use random"
        )
    if config.alignment and config.form != "sae":
        raise UserError(
            f"--train.alignment={config.alignment} draws encoder and decoder together, which in a {config.form} are of "
            "different sites: leave it out"
        )
    return DictionaryConfig(
        kind=kind,
        site=stack[0].site,
        target="" if config.form == "sae" else stack[0].target,
        d_in=d_in,
        n_features=features,
        skip=config.form == "skip_transcoder",
        centred=config.form == "sae",
        widths=shape if len(shape) > 1 else (),
        **facts,
    )


def check_divides(config: TrainConfig, n_features: int, members: int, axes: Mapping[str, int]) -> None:
    """A ``UserError`` unless the mesh divides the batch, the features and the members of a stack.

    Args:
      n_features: of each member.
    """
    if config.batch % axes["data"]:
        raise UserError(f"--train.batch={config.batch} is not divisible by the {axes['data']} devices on the data axis")
    if n_features % axes["model"]:
        raise UserError(f"{n_features} features are not divisible by --mesh.model={axes['model']}")
    if members % axes["member"]:
        devices = math.prod(axes.values())
        fitting = [n for n in range(1, devices + 1) if members % n == 0 and devices % n == 0]
        raise UserError(
            f"--mesh.member={axes['member']} does not divide the stack's {members} members: with {devices} devices it "
            f"can be {', '.join(map(str, fitting))}"
        )
