"""The fields of the stages' results, for the pages of files (``docs/artifacts*.md``) of the site.

They are read from the classes of results: the comment (``#:``) beside each field. Every stage has a place in a page,
``<!-- results: STAGE -->`` followed by ``<!-- end -->``. A class is described where it first occurs; the place
"common" has those of several stages, and "manifest" what a store says of itself.

``python docs/result_fields.py STAGE`` prints the fields of a stage's results; ``study_run`` those of ``study.json``.
"""

import ast
import dataclasses
import functools
import inspect
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from saejax import results
from saejax.activations.manifest import Manifest
from saejax.runner.registry import all_stages
from saejax.runner.results import results_class
from saejax.studies.results import StudyFigures

# In the order in which they are read: a class is described on the first page that has it.
PAGES = tuple(Path(__file__).parent / f"{name}.md" for name in ("artifacts", "artifacts_causal", "artifacts_features"))
COMMON = (results.Interval, results.MeshShape)
_PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """Return field -> the comment beside it, or above it, in the class itself and in those it inherits from."""
    comments = dict(field_comments(cls.__base__)) if dataclasses.is_dataclass(cls.__base__) else {}
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            above = [line for line in range(node.lineno - 1) if lines[line].strip().startswith("#:")]
            first = node.lineno - 1
            while first - 1 in above:
                first -= 1
            texts = [lines[line].partition("#:")[2].strip() for line in range(first, node.end_lineno)]
            comments[node.target.id] = " ".join(filter(None, texts))
    return comments


def classes(hint: object) -> list[type]:
    """Return the classes of results that a type names, in order."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for argument in typing.get_args(hint) for cls in classes(argument)]


def every_class(hint: object) -> Iterator[type]:
    """Yield the classes of a stage's results, from the outside in; a class may come twice."""
    for cls in classes(hint):
        yield cls
        for inner in _field_types(cls).values():
            yield from every_class(inner)


def _field_types(cls: type) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def describe(cls: type) -> str:
    """Return a class as a paragraph of a list: what it is, and each of its fields."""
    fields: dict[str, list[str]] = {}  # description -> the fields that it describes
    for name, hint in _field_types(cls).items():
        inner = " or ".join(
            f"`{inner_class.__name__}`" for inner_class in classes(hint) if inner_class is not results.Interval
        )
        of = {dict: "by name ", tuple: "each "}.get(_container(hint), "")
        fields.setdefault(f"{f' ({of}{inner})' if inner else ''}: {field_comments(cls)[name].rstrip('.')}", []).append(
            name
        )
    parts = [", ".join(f"`{name}`" for name in names) + text for text, names in fields.items()]
    title = inspect.getdoc(cls).rstrip(".")
    text = f"- **{cls.__name__}**: {title[:1].lower()}{title[1:]}. {'; '.join(parts)}."
    return textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _container(hint: object) -> type | None:
    """Return ``dict`` for a mapping, ``tuple`` for a sequence, optional ones included."""
    if isinstance(hint, types.UnionType):
        hint = next(argument for argument in typing.get_args(hint) if argument is not types.NoneType)
    origin = typing.get_origin(hint)
    return tuple if origin is tuple else dict if origin else None


def fill_pages() -> dict[Path, str]:
    """Return each page with every place filled."""
    described = set(COMMON)

    def fill(place: re.Match) -> str:
        name, new = place[2], COMMON
        if name != "common":
            outer = Manifest if name == "manifest" else results_class(name)
            new = tuple(cls for cls in dict.fromkeys(every_class(outer)) if cls not in described)
            described.update(new)
        return place[1] + "".join(describe(cls) + "\n" for cls in new) + place[3]

    return {page: _PLACE.sub(fill, page.read_text("utf-8")) for page in PAGES}


def documented_stages() -> set[str]:
    """Return the stages that have a place in a page."""
    places = [place[2] for page in PAGES for place in _PLACE.finditer(page.read_text("utf-8"))]
    return set(places) & set(all_stages())


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends in silence where a reader such as head has enough
    names = [name for name in all_stages() if dataclasses.is_dataclass(results_class(name))] + ["study_run"]
    for stage in sys.argv[1:] or ["--help"]:
        if stage not in names:
            sys.exit(f"usage: python docs/result_fields.py STAGE, one or more of {', '.join(names)}")
        outer = StudyFigures if stage == "study_run" else results_class(stage)
        print("\n".join(describe(cls) for cls in dict.fromkeys(every_class(outer))))
