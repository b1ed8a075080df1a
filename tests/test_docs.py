"""The README's example and the tour run as they stand; guides and files for contributors name what exists."""

import ast
import json
import re
import runpy
import shlex
import tomllib
import types
from pathlib import Path

import jax
import pytest
import yaml
from absl import flags
from tiny_models import OTHER_FIELDS

import saejax
from benchmarks import tool_environments
from saejax.cli import list_programs
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.models.families import FAMILIES
from saejax.runner import command_line
from saejax.runner.flags import define_flags
from saejax.runner.registry import all_groups, all_stages

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NOTEBOOKS = {name: json.loads((ROOT / f"docs/{name}.ipynb").read_text("utf-8")) for name in ("tour", "graphs")}
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "CITATION.cff") for path in ROOT.glob(pattern))
# docs/extending.md names files that a reader makes; tests/test_extending.py and tests/test_stages.py run what it says.
GUIDES = [path for path in PAGES if path.name not in ("CHANGELOG.md", "CITATION.cff", "extending.md")]
# Of registries and hubs; spelt so that this file does not name them.
HOSTS = re.compile(r"\b(pypi|pythonhosted|huggingface|hf|github|anaconda|docker|readthedocs)\.(org|co|com|io)\b")


def test_the_python_example_runs(tmp_path, monkeypatch, capsys, smollm2, single_device):
    """On a random dictionary in place of the demo's, which takes minutes to train."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    described = DictionaryConfig(kind="topk", site="resid_post.15", d_in=576, n_features=1152, k=48, max_norm=1600.0)
    dictionary = Dictionary.initial(described, jax.random.key(0))
    save_dictionary(tmp_path / "runs/demo/train/topk/dictionary", dictionary)
    top = types.SimpleNamespace(top=dict(capital=[types.SimpleNamespace(feature=feature) for feature in range(200)]))
    monkeypatch.setattr("saejax.runner.results.load_results", lambda folder: top)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    before, after = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    output = smollm2(names["tokens"])
    assert before == pytest.approx(float(output.logit("Paris") - output.logit("Rome")), abs=1e-3)
    assert before != after


def code_of(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_tour_runs(monkeypatch, tmp_path, capsys):
    """As it stands, cell by cell; it takes two minutes."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, cell in enumerate(code_of("tour")):
        exec(compile(cell, f"tour.ipynb, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert names["scores"].explained_variance > 0.3
    answers = names["found"].verdict.dictionaries["tested"]["capital"]
    assert answers.random.sentence in printed and answers.placebo.sentence in printed
    assert 0 < len(names["pruned"].nodes) <= len(names["graph"].nodes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_have_their_outputs_and_nothing_of_the_machine_that_ran_them(name):
    """`make notebooks` runs them, from top to bottom."""
    notebook = NOTEBOOKS[name]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    for cell, code in zip(cells, code_of(name), strict=True):
        assert bool(cell["outputs"]) == ("print(" in code), code
        assert {(output["output_type"], output.get("name")) for output in cell["outputs"]} <= {("stream", "stdout")}
        ast.parse(code)
        assert set(re.findall(r"saejax\.(\w+)\(", code)) <= set(saejax.__all__)
    text = json.dumps(notebook)
    assert not re.search(r"(?<![\w.])/(tmp|root|home|work|usr|opt)/", text) and len(text) < 1_000_000


def test_pages_of_the_site(tmp_path, monkeypatch):
    """What Sphinx is given; whether it can read all docstrings without a warning, `make docs` says."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    runpy.run_path(str(ROOT / "docs" / "pages.py"))["main"](tmp_path / "sources")
    written = {path.relative_to(tmp_path / "sources").as_posix() for path in (tmp_path / "sources").rglob("*.*")}
    assert {"index.md", "README.md", "WORKSPACE.md", "docs/tour.md", "docs/graphs-notebook.md"} <= written
    text = "".join(path.read_text() for path in (tmp_path / "sources/reference").iterdir())
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "saejax").rglob("*.py")
    }
    assert modules == set(re.findall(r"automodule:: (\S+)", text))


def headings(path: Path) -> set[str]:
    """The names by which a page's headings are linked to: small letters and digits, with dashes for spaces."""
    lines = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_link_to_and_guides_name_what_exists(path):
    """Pages, targets; in guides also files, binaries and commands, flags, and names of the library."""
    text = path.read_text("utf-8")
    assert not HOSTS.search(text)
    for link, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", text):
        assert (path.parent / link).exists(), link
        assert not heading or heading in headings(path.parent / link), f"{link}#{heading}"
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    if path not in GUIDES:
        return
    for name in re.findall(r"(?:configs|docs|scripts|saejax|tests)/[\w./]+\.\w+", text):
        assert (ROOT / name).exists(), name
    for binary in re.findall(r"experiments\.(?!py\b)(\w+)", text):
        assert (ROOT / "experiments" / f"{binary}.py").exists(), binary
    values = flags.FlagValues()
    define_flags(all_groups(), values)
    for flag in re.findall(r"--(\w+(?:\.\w+)+)", text):
        assert flag in values, flag
    for name in re.findall(r"(?<![\w/.-])saejax\.(\w+)\(", text):
        assert name in saejax.__all__, name
    for program in re.findall(r"(?<!SAEJAX=)\.venv/bin/saejax ([a-z_]+)\b", text):
        assert program in list_programs(), program


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_command_lines_of_the_guides_are_read(path, tmp_path):
    """As far as flags go: their names, ranges and choices, whether their binary takes them, and the files they name."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    # The reader's own flag file is the block of flags, one a line, that stands before the commands.
    (tmp_path / "mine.flags").write_text("".join(re.findall(r"^```\n((?:--\S*\n)+)```$", text, re.MULTILINE)))
    several = dict(baseline=["baseline", "benchmark"], pipeline=list(all_stages()))
    for binary, line in re.findall(r"^\.venv/bin/python -m experiments\.(\w+) (.*)$", text, re.MULTILINE):
        if binary not in ("study_run", "serve"):
            line = line.replace("=configs/", f"={ROOT}/configs/").replace("=mine.flags", f"={tmp_path}/mine.flags")
            words = ["program", *shlex.split(line, comments=True)]
            command_line.read_configs(command_line.stage_flags(), words, several.get(binary, [binary]))


def test_what_guides_launchers_and_hooks_install_and_use_is_there():
    files = [*PAGES, ROOT / "Makefile", *sorted((ROOT / "launch").iterdir())]
    texts = [text for path in files for text in re.findall(r"'\.\[([\w,]+)\]'", path.read_text("utf-8"))]
    named = {extra for text in texts for extra in text.split(",")}
    assert named <= PROJECT["optional-dependencies"].keys() and {"cuda12", "cuda13", "tpu"} <= named
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["repo"] == "local" and all(hook["entry"].startswith(".venv/bin/") for hook in hooks["hooks"])
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["run"]["steps"][-1]["run"] == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o111


def test_flags_of_the_makefile_exist():
    values = flags.FlagValues()
    define_flags(all_groups(), values)
    named = {*re.findall(r"--(\w+\.[\w.]+)=", MAKEFILE)}
    assert len(named) > 20 and named <= {*values}


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"] == saejax.__version__
    assert f"## {saejax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_page_of_parity_has_every_family_and_the_versions_in_use():
    """So that it is measured again, by `make parity`, when a family or a version comes; and it says that all agree."""
    text = (ROOT / "docs/parity.md").read_text("utf-8")
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert {row[0] for row in rows if len(row) == 8} - {"family"} == {*FAMILIES}
    assert {row[0] for row in rows if len(row) == 3} - {"family"} == {*OTHER_FIELDS}
    tools = f"{tool_environments.SAE_LENS}\n{tool_environments.CIRCUIT_TRACER}"
    pins = dict(re.findall(r"^(\S+)==(\S+)$", f"{(ROOT / 'constraints.txt').read_text()}\n{tools}", re.MULTILINE))
    versions = dict(row for row in rows if len(row) == 2 and row[0] != "package")
    assert {"transformers", "sae-lens", "circuit-tracer"} <= {*versions}
    assert versions == {name: pins[name] for name in versions}
    assert any("5.24" <= row[0] < "6" for row in rows if len(row) == 9)  # a version newer than the pinned one
    assert {row[0] for row in rows if len(row) == 4} >= {"sae-lens", "saejax", "llama", "gpt2"}
    errors = [float(cell) for row in rows for cell in row if re.fullmatch(r"\d\.\de[+-]\d\d", cell)]
    assert len(errors) > 100 and max(errors) < 1e-4
    counts = [cell.split(" of ") for row in rows for cell in row if re.fullmatch(r"\d+ of \d+", cell)]
    assert len(counts) > 30 and all(right == total for right, total in counts)


def test_the_troubleshooting_page_quotes_lines_that_exist():
    """Each row's words stand in a string of the package."""
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "saejax").rglob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) > 20 and not [words for words in quoted if words not in source]


def test_tests_name_every_statement_of_what_must_hold():
    workspace = (ROOT / "WORKSPACE.md").read_text()
    listed = re.findall(r"^(\d+)\. \*\*", workspace.split("## What must hold")[1].split("\n## ")[0], re.M)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"^# Statement (\d+) of WORKSPACE\.md", tests, re.M))
    assert len(listed) > 10 and named == set(listed)
