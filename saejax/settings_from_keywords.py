"""Settings as a function's keywords."""

import dataclasses
import os
import typing
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

from saejax.config import Config
from saejax.errors import UserError, nearest_names

ConfigT = TypeVar("ConfigT", bound=Config)
_TAKES: dict[Any, Any] = {bool: bool | np.bool_, int: Integral, float: Real, str: str | os.PathLike}
_WORDS: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_SIZE = ("features", "expansion")
# What SAELens, dictionary_learning and others call a setting of training, where its name here is not alike.
_ELSEWHERE = {
    **dict.fromkeys(("d_sae", "dict_size", "d_hidden", "hidden_dim", "n_latents", "num_latents", "width"), _SIZE),
    **dict.fromkeys(("training_tokens", "n_steps", "steps"), ("max_steps", "epochs")),
    **dict.fromkeys(("sparsity_penalty", "sparsity_coefficient", "l1_lambda"), ("l1",)),
    **dict.fromkeys(("lr_warm_up_steps", "lr_warmup_steps"), ("warmup",)),
    **dict.fromkeys(("l1_warm_up_steps", "sparsity_warmup_steps"), ("penalty_warmup",)),
    **dict.fromkeys(("adam_beta1", "beta1"), ("b1",)),
    **dict.fromkeys(("adam_beta2", "beta2"), ("b2",)),
    "lr_decay_steps": ("decay",),
    "decay_start": ("decay",),
    "max_grad_norm": ("clip",),
    "aux_loss_coefficient": ("auxk",),
    "l0": ("k",),
    "topk": ("k",),
}


def make_config(cls: type[ConfigT], unit: str = "", **settings: Any) -> ConfigT:
    """Return a group of settings; a value in place of a list makes a list of one.

    Args:
      cls: the group.
      unit: the unit whose own settings, in a group nested in this one, may be given too, such as "jumprelu".
      **settings: the values, by name.

    Raises:
      UserError: a setting is unknown, of another type, or out of range.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        inner = field.metadata.get("nested", dict)().get(unit)
        names = set(typing.get_type_hints(inner)) - set(hints) if inner else set()
        if inside := {name: settings.pop(name) for name in names & set(settings)}:
            values[field.name] = {unit: make_config(inner, **inside)}
    for name, value in settings.items():
        if name not in hints:
            meant_here = [other for other in _ELSEWHERE.get(name, ()) if other in hints]
            near = " or ".join(meant_here or nearest_names(name, hints))
            meant = f"did you mean {near}? " if near else ""
            raise UserError(f"unknown setting of {cls.__name__} {name!r}: {meant}expected one of {', '.join(hints)}")
        takes_list = typing.get_origin(hints[name]) is tuple
        listed = value if isinstance(value, tuple | list) else (value,)
        kind = typing.get_args(hints[name])[0] if takes_list else hints[name]
        for item in listed if takes_list else (value,):
            is_bool = isinstance(item, bool | np.bool_)
            if kind in _TAKES and (not isinstance(item, _TAKES[kind]) or is_bool != (kind is bool)):
                raise UserError(f"{name} is {item!r}: expected {_WORDS[kind]}")
        # As Python's own types, which settings are saved as: numbers of numpy and paths are no JSON.
        plain = tuple(kind(item) if kind in _TAKES else item for item in (listed if takes_list else (value,)))
        values[name] = plain if takes_list else plain[0]
    return cls(**values)
