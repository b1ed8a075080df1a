"""What keeps the code one house: no circle of imports, each class name once, letters of shapes from one table."""

import ast
from collections import defaultdict
from pathlib import Path

import shapes

ROOT = Path(__file__).parent.parent
PATHS = sorted(path for top in ("saejax", "experiments") for path in (ROOT / top).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

LOADERS = {"import_module", "__import__", "load"}  # functions that take the name of a module

# What is still to be mended; each list may only become shorter.
KNOWN_CIRCLES: list[set[str]] = []
KNOWN_DOUBLES: set[str] = set()
KNOWN_LETTERS = {"O", "U", "W", "X"}


def loaded_by_name(tree: ast.Module) -> set[str]:
    """The modules that a file names as text where it loads them: "module" or "module:function"."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    loads = [node.args[0] for node in calls if getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS]
    return {
        text.value.partition(":")[0] for text in loads if isinstance(text, ast.Constant) and type(text.value) is str
    }


def imported(name: str) -> set[str]:
    """The modules that a module's statements name, wherever in the file they stand, or load by their names."""
    found = loaded_by_name(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: imports name the whole module"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in MODULES else node.module for one in inner}
    return (found & MODULES.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach each other and themselves (found by depth, as they are few)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    found = [{other for other in reach[name] if name in reach[other]} for name in graph if name in reach[name]]
    return [circle for i, circle in enumerate(found) if circle not in found[:i]]


def defined(name: str) -> set[str]:
    """The names that a module has: its statements', and the modules in its folder."""
    found = {other.removeprefix(f"{name}.").split(".")[0] for other in MODULES if other.startswith(f"{name}.")}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_what_tests_and_benchmarks_import_is_there():
    """No test need run a benchmark, or a test that is slow, to see that a name has moved."""
    missing = []
    for path in sorted(path for top in ("tests", "benchmarks", "scripts") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saejax" != node.module:
                known = defined(node.module) if node.module in MODULES else set()
                missing += [f"{path.name}: {node.module}.{a.name}" for a in node.names if a.name not in known]
    assert not missing


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set(), "e": {"f"}, "f": {"g"}, "g": {"e"}}
    assert circles(graph) == [{"b", "c"}, {"e", "f", "g"}]


def test_what_is_loaded_by_name_counts_as_imported():
    text = (
        'import_module("a.b"); importlib.import_module("c"); load("d:run"); load(stage.run); importlib.import_module(e)'
    )
    assert loaded_by_name(ast.parse(text)) == {"a.b", "c", "d"}


def test_no_circle_between_files():
    found = circles({name: imported(name) for name in MODULES})
    assert not [circle for circle in found if circle not in KNOWN_CIRCLES], "files import each other in a circle"
    assert not [circle for circle in KNOWN_CIRCLES if circle not in found], "mended: take it from KNOWN_CIRCLES"


def test_a_class_name_stands_once():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    double = {name: where for name, where in places.items() if len(where) > 1}
    assert not {name: where for name, where in double.items() if name not in KNOWN_DOUBLES}, "one name for one thing"
    assert not KNOWN_DOUBLES - double.keys(), "mended: take it from KNOWN_DOUBLES"


def test_letters_are_from_the_table():
    known = shapes.table().keys()
    assert len(known) > 10, "WORKSPACE.md has a table of letters"
    places = defaultdict(set)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            names = (
                [node.arg]
                if isinstance(node, ast.arg | ast.keyword)
                else [getattr(node, "id", getattr(node, "attr", None))]
            )
            for name in filter(None, names):
                for letter in shapes.letters(name) - known:
                    places[letter].add(f"{module} {name}")
    unknown = {letter: sorted(where) for letter, where in places.items() if letter not in KNOWN_LETTERS}
    assert not unknown, "letters that WORKSPACE.md's table does not have"
    assert not KNOWN_LETTERS - places.keys(), "mended: take it from KNOWN_LETTERS"
