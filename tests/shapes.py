"""Shapes checked while tests run: what a name's suffix says of an array must be so.

An array of the ``CHECKED`` packages that contradicts its name fails the test in which it does
(``SAEJAX_CHECK_SHAPES=off`` checks nothing).

An argument, a local variable or a field called ``acts_BxTxD`` must be an array of three dimensions, and B, T and D must
be the same wherever these letters stand in one call of one function (in one round of a loop). A number is a fixed size,
as in ``answers_Bx2``. An x in front or behind stands for any further dimensions, the same in one call: ``pre_xF`` has
features last, ``array_SxRx`` has shards and rows first. WORKSPACE.md has the letters.

The source stays free of annotations: modules are rewritten when they are imported. Functions and rounds of loops become
scopes, in which every letter keeps the size that it was first seen with. Lambdas and comprehensions are not seen, and
in generators each array is checked by itself.
"""

import ast
import functools
import re
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parent.parent
CHECKED = ("models", "dictionaries", "training", "activations", "evaluation", "attribution")
CHECKED += ("interventions", "matching", "interpret", "ground_truth")
_SUFFIX = re.compile(r"_*[A-Za-z0-9]\w*?_(x?(?:[A-Z]|\d+)(?:x(?:[A-Z]|\d+))*x?)")


def suffix(name: str) -> str | None:
    """The shape at the end of a name, such as "BxTxD"; None where there is none."""
    match = _SUFFIX.fullmatch(name)
    return match[1] if match and re.search("[A-Z]|x", match[1]) else None


def letters(name: str) -> set[str]:
    """The letters of a name's shape, none if it has no shape."""
    return set(re.findall("[A-Z]", suffix(name) or ""))


def table() -> dict[str, str]:
    """WORKSPACE.md's table of letters: what each letter means."""
    rows = re.findall(r"^\| ([A-Z]) \| (.+?) \|$", (ROOT / "WORKSPACE.md").read_text(), re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a letter stands twice in WORKSPACE.md's table"
    return dict(rows)


@functools.cache
def parsed(name: str) -> tuple[bool, tuple[str | int, ...], bool]:
    """The shape of a name: are there dimensions in front, the letters and sizes, are there dimensions behind."""
    shape = suffix(name) or ""
    parts = shape.strip("x").split("x")
    return shape.startswith("x"), tuple(int(part) if part.isdigit() else part for part in parts), shape.endswith("x")


def check(name: str, value: Any, where: str) -> None:
    """Compares a value with its name, in the scope that was entered last."""
    shape = getattr(value, "shape", None)
    if value is None or isinstance(value, type):
        return
    assert shape is not None and hasattr(value, "dtype"), f"{where} {name} {type(value).__name__} is no array"
    fault = mismatch(name, tuple(shape))
    assert not fault, f"{where} {name} is {list(shape)}: {fault}"


class _Scopes(threading.local):
    """The sizes of the letters in each scope that a thread has entered, the last one on top; a context manager."""

    def __init__(self) -> None:
        self.sizes: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.sizes.append({})

    def __exit__(self, *error: object) -> None:
        self.sizes.pop()


SCOPE = _Scopes()  # within it the letters keep the sizes that they were first seen with


def mismatch(name: str, shape: tuple[int, ...]) -> str:
    """What contradicts a name, given the sizes of letters in the scope that was entered last; "" if nothing does."""
    before, parts, behind = parsed(name)
    held = SCOPE.sizes[-1] if SCOPE.sizes else {}
    more = len(shape) - len(parts)
    if more < 0 or (more and not (before or behind)):
        return f"it has {len(shape)} dimensions, expected {'at least ' * (before or behind)}{len(parts)}"
    for letter, size in zip(parts, shape[more:] if before else shape, strict=False):
        expected = letter if isinstance(letter, int) else held.setdefault(letter, size)
        if size != expected:
            return f"the size of {letter} is {size}, expected {expected}"
    if before or behind:
        letter, further = ("before", shape[:more]) if before else ("behind", shape[len(parts) :])
        if further != held.setdefault(letter, further):
            return f"the size of {letter} is {further}, expected {held[letter]}"
    return ""


def install() -> None:
    """Rewrites packages at their import. saejax must not be imported yet."""
    assert not any(name.startswith("saejax.") for name in sys.modules), "shapes must be installed before saejax"
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        pieces = fullname.split(".")
        if len(pieces) < 2 or pieces[0] != "saejax" or pieces[1] not in CHECKED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # past the compiled files, which are of the source as it stands
        where = Path(self.path)
        return rewritten(where.read_text(), str(where.relative_to(ROOT)))


def rewritten(source: str, path: str) -> CodeType:
    """A module with its checks."""
    tree = _Checked(path).visit(ast.parse(source))
    start = _start(tree.body)
    tree.body[start:start] = ast.parse("import shapes as _shapes_\nfrom shapes import SCOPE as _scope_").body
    return compile(ast.fix_missing_locations(tree), str(ROOT / path), "exec", dont_inherit=True)


def _start(body: list[ast.stmt]) -> int:
    """Where statements start: behind the docstring and imports from the future."""
    start = int(bool(body) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant))
    while start < len(body) and getattr(body[start], "module", None) == "__future__":
        start += 1
    return start


class _Checked(ast.NodeTransformer):
    """Puts checks behind assignments, at the start of functions and of the rounds of loops."""

    def __init__(self, path: str):
        self.path = path
        self.scoped: list[bool] = []  # for each function around: does it have a scope of its own

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.scoped.append(not any(isinstance(n, ast.Yield | ast.YieldFrom) for n in _own_nodes(node)))
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        checks = self._targets([ast.Name(argument.arg, ast.Load()) for argument in arguments], node)
        start = _start(node.body)
        body = checks + self._statements(node.body[start:])
        # A generator's body runs in pieces, between which others are in force: there each array is checked by itself.
        node.body = node.body[:start] + ([_in_scope(body, node)] if self.scoped.pop() and body else body)
        return node

    def visit_For(self, node: ast.For) -> ast.For:
        return self._round(node, self._targets([node.target], node))

    def visit_While(self, node: ast.While) -> ast.While:
        return self._round(node, [])

    def visit_With(self, node: ast.With) -> ast.With:
        targets = [item.optional_vars for item in node.items if item.optional_vars]
        node.body = self._targets(targets, node) + self._statements(node.body)
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        return self._with_checks(node, node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        return self._with_checks(node, [node.target])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return self._with_checks(node, [node.target] if node.value else [])

    def _with_checks(self, node: Any, targets: list[Any]) -> Any:
        node = self.generic_visit(node)
        return [node, *self._targets(targets, node)] if self.scoped else node

    def _statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        changed = [self.visit(statement) for statement in body]
        return [part for new in changed for part in (new if isinstance(new, list) else [new])]

    def _round(self, node: Any, checks: list[ast.stmt]) -> Any:
        """A loop, with letters of its own in each round; those of the arrays that it reads from outside hold there."""
        changed = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        read = {
            n.id for s in node.body for n in _own_nodes(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        outside = [self._outside(name, node) for name in sorted(read - changed) if suffix(name)]
        node.body = checks + self._statements(node.body)
        node.orelse = self._statements(node.orelse)
        if self.scoped and self.scoped[-1] and any(_is_check(n) for s in node.body for n in ast.walk(s)):
            node.body = [_in_scope(outside + node.body, node)]
        return node

    def _outside(self, name: str, node: Any) -> ast.stmt:
        # A name of the function or around it, which may not have a value yet.
        attempt = ast.parse("try: pass\nexcept NameError: pass").body[0]
        attempt.body = [self._check(name, name, node)]
        return ast.copy_location(attempt, node)

    def _targets(self, targets: list[Any], node: Any) -> list[ast.stmt]:
        checks: list[ast.stmt] = []
        for target in targets:
            if isinstance(target, ast.Tuple | ast.List):
                checks += self._targets(target.elts, node)
            elif isinstance(target, ast.Name) and suffix(target.id):
                checks.append(self._check(target.id, target.id, node))
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and suffix(target.attr):
                checks.append(self._check(target.attr, f"{target.value.id}.{target.attr}", node))
        return checks if self.scoped[-1:] == [True] else [_in_scope([check], node) for check in checks]

    def _check(self, name: str, value: str, node: Any) -> ast.stmt:
        call = ast.parse(f"_shapes_.check({name!r}, {value}, '{self.path}:{node.lineno}')").body[0]
        return ast.copy_location(call, node)


def _own_nodes(node: ast.AST) -> Any:
    """The nodes of a function or statement, without those of functions defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _own_nodes(child)


def _in_scope(body: list[ast.stmt], node: ast.AST) -> ast.stmt:
    scoped = ast.parse("with _scope_: pass").body[0]
    scoped.body = body
    return ast.copy_location(scoped, node)


def _is_check(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "_shapes_"
