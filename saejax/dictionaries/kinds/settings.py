"""Kinds of dictionary: their names, and which settings each of them reads.

What a kind computes is its class in ``dictionaries.kinds``, under the same name. A kind from outside (``--plugins``) is
added to both when its class is registered.
"""

import dataclasses

from saejax.config import Config, setting

PRETRAINED = "pretrained"  # in the place of a kind: dictionaries that were not trained here


@dataclasses.dataclass(frozen=True)
class JumpReLUConfig(Config):
    """Settings of JumpReLU dictionaries alone."""

    l0_coefficient: tuple[float, ...] = setting(
        (1.0,),
        "coefficient of the L0 penalty (or a list); with the penalty 'target', about five times the squared error "
        "per token keeps L0 within a tenth of the target, and less leaves it above",
        low=0.0,
        swept=True,
    )
    l0_penalty: str = setting(
        "step",
        "penalty: the number of active features (step), a tanh of their size (tanh), or (L0 / target - 1)^2 (target)",
        choices=("step", "tanh", "target"),
    )
    target_l0: tuple[float, ...] = setting(
        (64.0,), "L0 aimed at by the penalty 'target' (or a list)", low=1.0, swept=True
    )
    bandwidth: float = setting(0.05, "width of the kernel that estimates the thresholds' gradient", low=1e-6)
    initial_threshold: float = setting(0.01, "thresholds at the start", low=0.0)
    pre_activation: float = setting(
        0.0,
        "coefficient of the pre-activation loss, the mean over tokens of sum max(threshold - pre, 0) |W_dec| over dead "
        "features, which brings them back (3e-6 in Conerly et al., 2025); 0: off",
        low=0.0,
    )
    nested: tuple[float, ...] = setting(
        (),
        "shares of the features, ascending to 1, that must reconstruct by themselves, as in a matryoshka dictionary; "
        "empty: no nested groups",
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class BatchTopKConfig(Config):
    """Settings of batchtopk dictionaries alone."""

    across_layers: bool = setting(
        False,
        "of a cross-layer transcoder: keep the largest activations of a batch in all layers together, so that layers "
        "share the k features per token and layer as they need them; otherwise each layer keeps k",
    )


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig(Config):
    """Settings of matryoshka dictionaries alone."""

    groups: tuple[float, ...] = setting(
        (0.0625, 0.125, 0.25, 0.5, 1.0),
        "shares of the features, ascending to 1, that must reconstruct by themselves",
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class KindSettings:
    """Settings of a kind of dictionary."""

    #: the class of the settings that only this kind has, ``--train.<kind>.<field>``. Fields made with ``setting(...,
    #: swept=True)`` are lists; each value makes a member of a stack.
    config: type[Config] = Config
    reads: tuple[str, ...] = ()  #: the settings of ``--train`` that several kinds share and this kind reads: "k", "l1"
    source: str = ""  #: hash of the plugin's file; "" for a kind of saejax


KIND_SETTINGS = {
    "standard": KindSettings(reads=("l1",)),
    "linear": KindSettings(reads=("l1",)),
    "gated": KindSettings(reads=("l1",)),
    "jumprelu": KindSettings(JumpReLUConfig),
    "topk": KindSettings(reads=("k",)),
    "batchtopk": KindSettings(BatchTopKConfig, reads=("k",)),
    "matryoshka": KindSettings(MatryoshkaConfig, reads=("k",)),
    "matching_pursuit": KindSettings(reads=("k",)),
}


def kind_names() -> tuple[str, ...]:
    """Return the names of all kinds, with the kinds of ``--plugins``."""
    return tuple(KIND_SETTINGS)


def unit_names() -> tuple[str, ...]:
    """Return the names of train units: all kinds, and the dictionaries that were trained elsewhere."""
    return (*kind_names(), PRETRAINED)


def settings_of_kinds() -> dict[str, type[Config]]:
    """Return, by kind, the class of the settings that only this kind has."""
    return {name: kind.config for name, kind in KIND_SETTINGS.items()}
