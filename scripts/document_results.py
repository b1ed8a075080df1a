"""Writes the fields of the stages' results into WORKSPACE.md, from the comments beside them (``#:``) in their classes.

    python scripts/document_results.py

Every stage has a place in the page, between ``<!-- results: STAGE -->`` and ``<!-- end -->``. A class is described
where it first occurs; the first place, "common", has those of several stages, and "manifest" has what a store says of
itself.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from saejax import results
from saejax.activations.manifest import Manifest
from saejax.runner.registry import STAGES

PAGE = Path(__file__).parent.parent / "WORKSPACE.md"
COMMON = (results.Interval, results.MeshShape)
_PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """Field -> the comment beside it, or above it, in the class itself and in those it inherits from."""
    found = dict(comments(cls.__base__)) if dataclasses.is_dataclass(cls.__base__) else {}
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            above = [line for line in range(node.lineno - 1) if lines[line].strip().startswith("#:")]
            first = node.lineno - 1
            while first - 1 in above:
                first -= 1
            said = [lines[line].partition("#:")[2].strip() for line in range(first, node.end_lineno)]
            found[node.target.id] = " ".join(filter(None, said))
    return found


def classes(hint: object) -> list[type]:
    """The classes of results that a type names, in order."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for argument in typing.get_args(hint) for found in classes(argument)]


def every_class(hint: object) -> Iterator[type]:
    """The classes of a stage's results, from the outside in; one may come twice."""
    for cls in classes(hint):
        yield cls
        for inner in typing.get_type_hints(cls).values():
            yield from every_class(inner)


def describe(cls: type) -> str:
    """A class in a paragraph of a list: what it is, and each of its fields."""
    said: dict[str, list[str]] = {}  # what is said -> the fields that it is said of
    for name, hint in typing.get_type_hints(cls).items():
        inner = " or ".join(f"`{one.__name__}`" for one in classes(hint) if one is not results.Interval)
        of = {dict: "by name ", tuple: "each "}.get(_container(hint), "")
        said.setdefault(f"{f' ({of}{inner})' if inner else ''}: {comments(cls)[name].rstrip('.')}", []).append(name)
    parts = [", ".join(f"`{name}`" for name in names) + text for text, names in said.items()]
    title = inspect.getdoc(cls).rstrip(".")
    text = f"- **{cls.__name__}**: {title[:1].lower()}{title[1:]}. {'; '.join(parts)}."
    return textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _container(hint: object) -> type | None:
    """``dict`` for a mapping, ``tuple`` for a sequence, optional ones included."""
    if isinstance(hint, types.UnionType):
        hint = next(argument for argument in typing.get_args(hint) if argument is not types.NoneType)
    origin = typing.get_origin(hint)
    return tuple if origin is tuple else dict if origin else None


def page(text: str) -> str:
    """The page with every place filled."""
    known = set(COMMON)

    def fill(place: re.Match) -> str:
        name, found = place[2], COMMON
        if name != "common":
            written = Manifest if name == "manifest" else results.results_class(name)
            found = [cls for cls in dict.fromkeys(every_class(written)) if cls not in known]
            known.update(found)
        return place[1] + "".join(describe(cls) + "\n" for cls in found) + place[3]

    return _PLACE.sub(fill, text)


def documented(text: str) -> set[str]:
    """The stages that have a place in the page."""
    return {place[2] for place in _PLACE.finditer(text)} & set(STAGES)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
