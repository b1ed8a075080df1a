"""Settings as a function's keywords."""

import dataclasses
import functools
import inspect
import os
import re
import textwrap
import typing
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import numpy as np

from saejax.config import Config, group_name, nested_groups, own_settings
from saejax.errors import UserError, nearest_names

ConfigT = TypeVar("ConfigT", bound=Config)
P = ParamSpec("P")
R = TypeVar("R")
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


def lists_settings(cls: type[Config], but: Collection[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let ``help`` and editors show the settings that a function takes as ``**settings``: a decorator.

    A ``UserError`` that names their flags names them as keywords.

    Args:
      cls: the group whose fields they are.
      but: names of fields that it does not take; its own parameters are none either.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        taken = [entry for entry in signature.parameters.values() if entry.kind is not entry.VAR_KEYWORD]
        settings = _settings_of(cls, {*but, *signature.parameters})
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default, _) in settings.items()
        ]
        lines = [
            textwrap.fill(f"{name}: {words}", 100, initial_indent="  ", subsequent_indent="    ")
            for name, (_, _, words) in settings.items()
        ]
        shared = {field.metadata["shared"] for field in own_settings(cls).values()} - {""}
        # Not those of a command that a message gives.
        flag = re.compile(rf"(?<!saejax train )--(?:{'|'.join([group_name(cls), *shared])})\.(?:\w+\.)?(\w+)")

        def name_keyword(match: re.Match[str]) -> str:
            # One of the sites, say, where the flag takes several.
            near = (match[1], match[1].removesuffix("s"))
            return next((name for name in near if name in settings or name in signature.parameters), match[0])

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except UserError as error:
                error.args = (flag.sub(name_keyword, str(error)),)
                raise

        shown: Any = call
        shown.__signature__ = signature.replace(parameters=[*taken, *keywords])
        shown.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Settings:", *lines, ""])
        return shown

    return decorate


def _settings_of(cls: type[Config], but: Collection[str]) -> dict[str, tuple[Any, Any, str]]:
    """Return of each setting its type, its default, and what it is, those of groups inside the group last."""
    settings: dict[str, tuple[Any, Any, str]] = {}
    for unit, group in (("", cls), *((name, inner) for _, name, inner in nested_groups(cls))):
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if "nested" in field.metadata or field.name in but:
                continue
            hint, default = hints[field.name], field.default
            if typing.get_origin(hint) is tuple:  # or a single value
                hint = typing.get_args(hint)[0] | hint
            words = f"{field.metadata.get('help', 'no flag sets it')}; default {default!r}"
            words = f"of the kind {unit}: {words}" if unit else words
            _, _, before = settings.get(field.name, (hint, default, ""))
            settings.setdefault(field.name, (hint, default, words))
            if before:  # several kinds have one of this name
                settings[field.name] = (*settings[field.name][:2], f"{before}. {words[:1].upper()}{words[1:]}")
    return settings
