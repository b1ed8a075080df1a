"""What keeps the code one house: no circle of imports, each class name once, letters of shapes from one table."""

import ast
import functools
import graphlib
import io
import re
import textwrap
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import shapes

ROOT = Path(__file__).parent.parent
PATHS = sorted(path for top in ("saejax", "experiments") for path in (ROOT / top).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


TREES = {name: parse(path) for name, path in MODULES.items()}

PAGES_OF_NOTEBOOKS = {"saejax.attribution.graph.graph"}
LOADERS = {"import_module", "__import__", "load"}  # functions that take the name of a module


def loaded_by_name(tree: ast.Module) -> set[str]:
    """The modules that a file names as text where it loads them: "module" or "module:function"."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    loads = [node.args[0] for node in calls if getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS]
    texts = [load.value for load in loads if isinstance(load, ast.Constant) and type(load.value) is str]
    return {text.partition(":")[0] for text in texts}


def import_names(tree: ast.Module, nodes: Iterable[ast.AST] | None = None) -> set[str]:
    """The modules that a file's statements name, wherever in it they stand, or load by their names."""
    names = loaded_by_name(tree)
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports name the whole module"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


def imported(name: str) -> set[str]:
    """The package's modules that a module imports; a notebook's method that writes a page imports it by itself."""
    nodes = TREES[name].body if name in PAGES_OF_NOTEBOOKS else None
    return (import_names(TREES[name], nodes) & MODULES.keys()) - {name}


@functools.cache
def defined(name: str) -> set[str]:
    """The names that a module has: its statements', and the modules in its folder."""
    names = {module.removeprefix(f"{name}.").split(".")[0] for module in MODULES if module.startswith(f"{name}.")}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_what_files_import_is_there():
    """No test need run a stage, a benchmark, or a test that is slow, to see that a name has moved."""
    missing = []
    tops = ("saejax", "experiments", "tests", "benchmarks", "scripts")
    for path in sorted(path for top in tops for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saejax" != node.module:
                names = defined(node.module) if node.module in MODULES else set()
                missing += [f"{path.name}: {node.module}.{a.name}" for a in node.names if a.name not in names]
    assert not missing


def test_what_is_loaded_by_name_counts_as_imported():
    text = 'import_module("a.b"); importlib.import_module("c"); load("d:run"); load(stage.run); import_module(e)'
    assert loaded_by_name(ast.parse(text)) == {"a.b", "c", "d"}


def test_no_circle_between_files():
    graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).prepare()  # or it raises the circle


def test_a_class_name_stands_once():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert not {name: where for name, where in places.items() if len(where) > 1}, "a name is for one thing"


def test_functions_of_training_take_six_parameters_at_most():
    many = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree) if name.startswith("saejax.training") else ():
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                many |= {f"{name}.{node.name}"} if len(arguments) > 6 else set()
    assert not many, "what belongs together is one argument"


def test_letters_are_from_the_table():
    table = shapes.table().keys()
    assert len(table) > 10, "WORKSPACE.md has a table of letters"
    unknown = defaultdict(set)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            name = next((getattr(node, field) for field in ("arg", "id", "attr") if getattr(node, field, None)), "")
            for letter in shapes.letters(name) - table:
                unknown[letter].add(f"{module} {name}")
    assert not unknown, "letters that WORKSPACE.md's table does not have"


PLAIN = {"Array", "ndarray", "int", "float", "str", "bool", "Any"}  # types that do not say what a parameter is


def undescribed(node: ast.FunctionDef, text: str) -> list[str]:
    """The parameters of plain types, if there are two or more, that the docstring does not speak of."""
    if re.search("(See|see|As|as|those of) ``", text):
        return []
    plain = []
    for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs:
        types = ast.unparse(argument.annotation).split(" | ") if argument.annotation else ["Any"]
        if argument.arg not in ("self", "cls") and {kind.split(".")[-1] for kind in types} <= PLAIN | {"None"}:
            plain.append(argument.arg)
    stems = {name: re.split("_(?=[A-Zx0-9])", name)[0] for name in plain}
    missing = [name for name, stem in stems.items() if not re.search(rf"(?<![a-zA-Z0-9]){stem}(?![a-zA-Z0-9])", text)]
    return missing if len(plain) > 1 else []


def test_a_parameter_that_the_docstring_leaves_out_is_found():
    source = "def f(acts_BxF: jax.Array, k: int | None, config: TrainConfig, rest=None): ..."
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert undescribed(function, "Keeps k of the acts, and the rest.") == []
    assert undescribed(function, "Keeps some of the rest.") == ["acts_BxF", "k"]
    assert undescribed(function, "Like ``g``, see ``g``.") == []


def test_docstrings_of_the_numeric_packages_say_what_parameters_are():
    """A name such as ``config: TrainConfig`` says it; two arrays or numbers or more do not."""
    classes = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def inherited(owner: ast.ClassDef, name: str) -> bool:
        bases = [classes[base] for base in map(ast.unparse, owner.bases) if base in classes]
        return any(name in {getattr(n, "name", "") for n in base.body} or inherited(base, name) for base in bases)

    wrong = []
    for module in (name for name in TREES if name.split(".")[1:2] and name.split(".")[1] in shapes.CHECKED):
        for owner in [None, *(n for n in TREES[module].body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]:
            for node in (owner or TREES[module]).body:
                if not isinstance(node, ast.FunctionDef) or node.name[0] == "_":
                    continue
                if owner and inherited(owner, node.name):
                    continue
                # A parameter named as a field is what the field's description (``#:``) says.
                fields = [ast.unparse(n.target) for n in owner.body if isinstance(n, ast.AnnAssign)] if owner else []
                docstrings = [ast.get_docstring(node) or "", (owner and ast.get_docstring(owner)) or ""]
                if missing := undescribed(node, " ".join([*docstrings, *fields])):
                    wrong.append(f"{module}:{node.lineno} {node.name}: {', '.join(missing)}")
    assert not wrong, "\n".join(wrong)


def test_files_of_tests_have_names_of_their_own():
    """Folders of tests are no packages, so that pytest imports a file by its name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


NUMERIC = {*shapes.CHECKED, "statistics", "circuits", "tasks"}  # packages whose code needs its reasons stated
LEAST_COMMENTS = 3  # lines of comments in 100 lines of code
_BLANK = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count_lines(source: str) -> tuple[int, int]:
    """Count the lines that are comments, and the lines of code: those that are neither blank, comment nor docstring.

    Orders to tools (``# noqa``, ``# type:``, ``# fmt:``), descriptions of fields (``#:``) and comments behind code
    count as neither.
    """
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    comments, code = 0, set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_order = re.match("#:|# ?(noqa|type:|fmt:)", token.string)
            comments += token.line.lstrip().startswith("#") and not is_order
        elif token.type not in _BLANK:
            code |= {*range(token.start[0], token.end[0] + 1)}
    return comments, len(code - docstrings)


def test_lines_are_counted():
    source = '''"""A file.

Its second line."""
# a reason
# of two lines
# fmt: skip

def f(x):
    "A line"
    # another
    text = """# no comment

    """  # behind
    return (  # noqa: E501
        x
    )
'''
    assert count_lines(source) == (3, 7)


def test_numeric_code_says_why():
    lines = {name: [0, 0] for name in NUMERIC}
    for module, path in MODULES.items():
        if (package := (module.split(".") + [""])[1]) in NUMERIC:
            comments, code = count_lines(path.read_text())
            lines[package] = [lines[package][0] + comments, lines[package][1] + code]
    few = {name: counts for name, counts in lines.items() if 100 * counts[0] < LEAST_COMMENTS * counts[1]}
    assert not few, "comments, and lines of code: say why where a newcomer would ask"


BANNED = {"one", "each", "own", "found", "told", "asked", "said", "given", "known", "beside", "made", "there"}
# A docstring starts with a verb or a noun.
OPENINGS = ("What", "Whether", "How", "Which", "Those", "Where", "When", "Why", "Who")


def unclear_language(tree: ast.Module) -> list[str]:
    """Return "line: word" for each name that says nothing, and each docstring that opens with a clause.

    Names are those of variables, loop variables, parameters, attributes that are assigned, and functions. Annotated
    fields of a class are left out: they are flags and keys of JSON files.
    """
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    fields = {id(node.target) for owner in classes for node in owner.body if isinstance(node, ast.AnnAssign)}
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
            words.append((node.lineno, node.id if isinstance(node, ast.Name) else node.attr))
        elif isinstance(node, ast.arg):
            words.append((node.lineno, node.arg))
        elif isinstance(node, ast.FunctionDef):
            words.append((node.lineno, node.name))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            words += [(node.body[0].lineno, opening) for opening in OPENINGS if re.match(rf"{opening}\b", text)]
    return [f"{line}: {word}" for line, word in words if word in BANNED or word in OPENINGS]


def test_unclear_language_is_noticed():
    source = """
        def made(own, *, told=0):
            "Whether it is."
            self.found = [one for one in own]
            known: int = 1
        class Verdict:
            "What is found."
            found: str
        shown = found.found
    """
    assert sorted(unclear_language(ast.parse(textwrap.dedent(source)))) == [
        "2: made", "2: own", "2: told", "3: Whether", "4: found", "4: one", "5: known", "7: What"
    ]  # fmt: skip


def test_names_and_docstrings_are_clear():
    tops = ("saejax", "experiments", "benchmarks", "scripts")
    paths = sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))
    wrong = [f"{path.relative_to(ROOT).as_posix()}:{word}" for path in paths for word in unclear_language(parse(path))]
    assert not wrong, "say what it is: " + ", ".join(wrong)


def test_every_fault_to_inject_has_its_line_once():
    """A line that was moved or rewritten would be no fault, and nobody would miss it until the next count."""
    faults = tomllib.loads((ROOT / "scripts" / "faults.toml").read_text())["fault"]
    for fault in faults:
        assert (ROOT / fault["file"]).read_text().count(fault["line"]) == 1, fault
        assert all((ROOT / test).exists() for test in fault["tests"]), fault
