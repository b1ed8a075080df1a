"""The members of a stack: which dictionaries one training program trains, and what differs between them.

All members of a stack have one shape and kind. What differs is data, not program: the site, the seed and the
hyperparameters are arrays with a leading axis over members, so a sweep compiles once.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from saejax.errors import UserError
from saejax.models.sites import ModuleSite, is_joined
from saejax.settings import TrainConfig
from saejax.settings.kinds import KIND_SETTINGS


@dataclasses.dataclass(frozen=True)
class Member:
    """One dictionary of a stack.

    Attributes:
      name: what tells it from the others: its site and swept settings, such as "resid_post.15-k32"; "" if it is alone.
      site, target: what it reads and predicts; the same for an SAE.
      settings: its own of the settings that can be swept: "learning_rate", "seed" and those that its kind reads.
    """

    name: str
    site: str
    target: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SiteScale:
    """What the trainer knows of the activations of a member's site.

    Attributes:
      input: factor that brings inputs to a mean norm of sqrt(d); ``output``: the same for targets.
      bias_D: where the decoder's bias starts, in raw units.
      max_norm, target_max_norm: norms of an input and a target above which it is an attention sink, in raw units.
      metric_DxD: what errors are multiplied with before they are squared; None: they are taken as they are.
      scales, max_norms: of the parts of a joined site, as in ``DictionaryConfig``; (): it is one site.
    """

    input: float
    output: float
    bias_D: np.ndarray
    max_norm: float | None = None
    target_max_norm: float | None = None
    metric_DxD: np.ndarray | None = None
    scales: tuple[float, ...] = ()
    max_norms: tuple[float, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
    """What the step reads of its members: arrays with a leading axis M, or without it for one member.

    Attributes:
      learning_rate, seed: as in ``Member``; ``own``: its other settings.
      input_scale, output_scale: as in ``SiteScale``.
      site: place in the batch of what the member reads.
      metric_DxD: as in ``SiteScale``; None if no member has one.
    """

    learning_rate: jax.Array
    own: dict[str, jax.Array]
    input_scale: jax.Array
    output_scale: jax.Array
    site: jax.Array
    seed: jax.Array
    metric_DxD: jax.Array | None

    @classmethod
    def of(
        cls, members: Sequence[Member], scales: Sequence[SiteScale], sites: Sequence[tuple[str, str]], dtype: str
    ) -> "Hyper":
        """The arrays of these members, on the host; ``sites`` are the (input, target) pairs of a batch."""

        def column(name: str) -> np.ndarray:
            values = [member.settings[name] for member in members]
            return np.array(values, np.int32 if all(isinstance(value, int) for value in values) else dtype)

        metrics = [scale.metric_DxD for scale in scales if scale.metric_DxD is not None]
        return cls(
            learning_rate=column("learning_rate").astype(dtype),
            own={name: column(name) for name in members[0].settings if name not in ("learning_rate", "seed")},
            input_scale=np.array([scale.input for scale in scales], dtype),
            output_scale=np.array([scale.output for scale in scales], dtype),
            site=np.array([sites.index((member.site, member.target)) for member in members], np.int32),
            seed=column("seed"),
            metric_DxD=np.stack(metrics).astype(dtype) if metrics else None,
        )


def members(config: TrainConfig, kind: str, sites: Sequence[str]) -> list[Member]:
    """The members that a configuration makes of a kind: one for every site and combination of the swept settings.

    Args:
      config: with one expansion, as of ``each_expansion``.
      kind: of the dictionaries.
      sites: the sites that they read, such as those of ``config.sites``.

    Raises:
      UserError: a transcoder's site is not "mlp_in.L", or ``l1_by_depth`` does not have three values.
    """
    lists = swept_settings(config, kind)
    swept = [name for name, values in lists.items() if len(values) > 1]
    depth_l1 = _l1_by_depth(config, kind, sites)
    made = []
    for site in sites:
        for values in itertools.product(*lists.values()):
            own = dict(zip(lists, values, strict=True))
            parts = [site] if len(sites) > 1 else []
            parts += [f"expansion{config.expansion}"] if config.expansions else []
            parts += [f"{name}{own[name]}" if name == "seed" else f"{name}{own[name]:g}" for name in swept]
            made.append(Member("-".join(parts), site, _target(config, site), own | depth_l1.get(site, {})))
    names_made = [member.name for member in made]
    if len(set(names_made)) < len(made):
        twice = next(name for name in names_made if names_made.count(name) > 1)
        raise UserError(f"the stack has two members {twice or 'with the same settings'}: name each value once")
    return made


def swept_settings(config: TrainConfig, kind: str) -> dict[str, tuple[Any, ...]]:
    """The values of each setting that can be swept and that a kind reads, in the order of members' names."""
    read = ("learning_rate", "seed", *KIND_SETTINGS[kind].reads)
    shared = {field.name: field for field in dataclasses.fields(config)}
    found = {name: getattr(config, name) for name in read if shared[name].metadata["swept"]}
    own = config.of_kind(kind)
    return found | {
        field.name: getattr(own, field.name) for field in dataclasses.fields(own) if field.metadata["swept"]
    }


def _target(config: TrainConfig, site: str) -> str:
    if config.form == "sae":
        return site
    kind, _, layer = site.partition(".")
    if kind != "mlp_in" or is_joined(site):
        raise UserError(f"a transcoder reads mlp_in.L, but --train.sites names {site}: name sites such as mlp_in.15")
    return f"mlp_out.{layer}"


def _l1_by_depth(config: TrainConfig, kind: str, sites: Sequence[str]) -> dict[str, dict[str, float]]:
    if "l1" not in KIND_SETTINGS[kind].reads or not config.l1_by_depth:
        return {}
    if len(config.l1_by_depth) != 3 or len(config.l1) > 1:
        raise UserError("--train.l1_by_depth takes three values (early, middle, late), and no list in --train.l1")
    for site in sites:
        if ModuleSite.names(site) or is_joined(site):
            raise UserError(f"--train.l1_by_depth goes by layers, and {site} does not say its own: use --train.l1")
    layers = sorted({int(site.rpartition(".")[2]) for site in sites})
    third = {layer: min(3 * place // len(layers), 2) for place, layer in enumerate(layers)}
    return {site: dict(l1=config.l1_by_depth[third[int(site.rpartition(".")[2])]]) for site in sites}
