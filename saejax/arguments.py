"""Checks of the arguments of public functions and methods: wrong classes and misspelt names are told in one line."""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError, nearest_names

P = ParamSpec("P")
R = TypeVar("R")
_Class = TypeVar("_Class", bound=type)

# Classes whose objects users confuse with their names, folders or values, and where such an object comes from.
_MADE_BY = {
    "LanguageModel": "saejax.load_model(NAME)",
    "Dictionary": "saejax.load_dictionary(FOLDER)",
    "Activations": "saejax.capture(lm, texts, sites)",
    "EffectsTable": "saejax.load_effects(FOLDER)",
    "LocalModel": "saejax.LocalModel(lm, transcoders, prompt)",
    "Prompt": "saejax.make_prompts(lm, BEHAVIOUR)",
}
_MADE_IN_LISTS = "Prompt"  # the class of which the call makes a list, not a single object
# By the annotation of a list: the class of a single item in its place, and how a message calls it.
_SINGLE = ((Sequence[str], str, "is one string"), (Sequence[int], Integral, "is one number"))


def as_index(number: Any) -> int:
    """Return a whole number of Python, NumPy or JAX as Python's; -1 for anything else, also for True and False."""
    try:
        return -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return -1


def as_numbers(values: Any, whole: bool = False) -> np.ndarray | None:
    """Return a number, or lists of them, as an array; None where they are something else, such as "3" or True.

    Args:
      values: of Python, NumPy, JAX or PyTorch; an empty list has no numbers and is taken.
      whole: whether they have to be integers.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError):  # such as lists of several lengths
        return None
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)  # bfloat16 among them, unlike for NumPy
    if array.size and not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        return None
    # NumPy reads [3, True] as 3 and 1.
    is_list = isinstance(values, list | tuple)
    return None if is_list and any(isinstance(value, bool | np.bool_) for value in values) else array


def check_classes(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a public function so that an argument of a class that its annotations exclude raises a ``UserError``.

    Checked are the parameters whose annotation has one of the classes of ``_MADE_BY``, or is a list of texts or of
    numbers, of which Python would read a single text letter by letter. Wrong numbers of arguments and unknown names
    raise Python's own ``TypeError``, with the nearest names.
    """
    signature = inspect.signature(function)
    hints = {name: entry.annotation for name, entry in signature.parameters.items() if _list_sources(entry.annotation)}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            values = signature.bind(*args, **kwargs).arguments
        except TypeError:
            _suggest_names(function, signature, len(args), kwargs)
            values = {}  # the call tells it in better words
        for name, hint in hints.items():
            if name in values and (wrong := _explain_misfit(values[name], hint)):
                raise UserError(f"{name} {wrong}: expected {' or '.join(_list_sources(hint))}")
        return function(*args, **kwargs)

    return checked


def suggests_names(cls: _Class) -> _Class:
    """Let the public methods of a class tell the nearest right names of misspelt ones: a decorator.

    A call costs nothing more unless it raises a ``TypeError``.
    """
    for name, method in list(vars(cls).items()):
        kind = type(method)
        function = method.__func__ if kind in (classmethod, staticmethod) else method
        if inspect.isfunction(function) and (not name.startswith("_") or name in ("__init__", "__call__")):
            suggesting = _with_suggestions(function)
            setattr(cls, name, kind(suggesting) if function is not method else suggesting)
    return cls


def _with_suggestions(method: Callable[P, R]) -> Callable[P, R]:
    """Wrap a method for ``suggests_names``."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def suggesting(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except TypeError:
            _suggest_names(method, signature, len(args), kwargs)
            raise

    return suggesting


def _suggest_names(
    function: Callable[..., Any], signature: inspect.Signature, first: int, keywords: Collection[str]
) -> None:
    """Raise a ``TypeError`` for a keyword that a function does not take, if it takes something like it.

    Args:
      function: for the message.
      signature: its signature.
      first: number of arguments that are given without a keyword.
      keywords: the given keywords.
    """
    if any(entry.kind is entry.VAR_KEYWORD for entry in signature.parameters.values()):
        return
    left = [name for name in [*signature.parameters][first:] if name not in keywords]
    for name in keywords:
        near = nearest_names(name, left)
        if near and name not in signature.parameters:
            raise TypeError(
                f"{function.__qualname__}() got an unexpected keyword argument {name!r}. Did you mean "
                f"{' or '.join(map(repr, near))}?"
            ) from None


def _list_sources(hint: Any) -> list[str]:
    """Return the calls that make objects of an annotation's classes."""
    if isinstance(hint, type) and (call := _MADE_BY.get(hint.__name__)):
        return [f"the result of {call}"]
    if any(hint == of_items for of_items, _, _ in _SINGLE):
        return ["a list of them"]
    parts, origin = typing.get_args(hint), typing.get_origin(hint)
    name = getattr(parts[0], "__name__", "") if origin is Sequence else ""
    if name in _MADE_BY and name != _MADE_IN_LISTS:
        return [f"a list of results of {_MADE_BY[name]}"]
    return list(dict.fromkeys(source for part in parts for source in _list_sources(part)))


def _explain_misfit(value: Any, hint: Any) -> str:
    """Return in words why a value does not fit an annotation; "" if it does, or may."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        reasons = [_explain_misfit(value, part) for part in parts]
        return "" if "" in reasons else max(reasons, key=len)  # the longest is of its items
    name = type(value).__name__
    reason = "is None" if value is None else f"is {'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    if hint in (None, types.NoneType):
        return reason if value is not None else ""
    if isinstance(hint, type):
        return "" if isinstance(value, hint) else reason
    for of_items, single, words in _SINGLE:
        if hint == of_items:
            return words if isinstance(value, single) else ""
    if isinstance(origin, type) and issubclass(origin, Iterable):
        # Of a mapping the items are its keys.
        is_other = isinstance(value, str | bytes) or (origin is Sequence and isinstance(value, Mapping))
        if is_other or not isinstance(value, Iterable):
            return reason
        if isinstance(value, Collection) and len(parts) == 1:
            return next(
                (f"holds an item that {wrong}" for item in value if (wrong := _explain_misfit(item, parts[0]))), ""
            )
    return ""
