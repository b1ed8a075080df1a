"""The site, the notebook and the files for contributors hold together."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "docs/tour.ipynb"
GUIDES = sorted(path for pattern in ("*.md", "docs/*.md", "CITATION.cff") for path in ROOT.glob(pattern))
# Of registries and hubs; spelt so that this file does not name them.
HOSTS = re.compile(r"\b(pypi|pythonhosted|huggingface|hf|github|anaconda|docker|readthedocs)\.(org|co|com|io)\b")


def code_cells() -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(TOUR.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"
    ]


@pytest.mark.slow
def test_the_tour_runs(monkeypatch, tmp_path, capsys):
    """As it stands, cell by cell; it takes two minutes."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, cell in enumerate(code_cells()):
        exec(compile(cell, f"tour.ipynb, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert names["scores"].explained_variance > 0.3
    answers = names["found"].verdict.dictionaries["tested"]["capital"]
    assert answers.random.sentence in printed and answers.placebo.sentence in printed
    assert 0 < len(names["pruned"].nodes) <= len(names["graph"].nodes)
    assert not any(tmp_path.iterdir())


def test_the_tour_is_a_notebook_without_outputs():
    notebook = json.loads(TOUR.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
    for code in code_cells():
        ast.parse(code)


def test_the_tour_uses_names_that_exist():
    import saejax

    for name in re.findall(r"saejax\.(\w+)\(", "\n".join(code_cells())):
        assert name in saejax.__all__, name


def test_what_guides_and_launchers_install_is_there():
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    files = [*GUIDES, ROOT / "Makefile", *sorted((ROOT / "launch").iterdir())]
    asked = {path.name: set(re.findall(r"'\.\[([\w,]+)\]'", path.read_text("utf-8"))) for path in files}
    named = {extra for texts in asked.values() for text in texts for extra in text.split(",")}
    assert named <= offered.keys() and {"cuda12", "cuda13", "tpu"} <= named


def test_pages_of_the_site(tmp_path, monkeypatch):
    """What Sphinx is given; whether it can read all docstrings without a warning, `make docs` says."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/pages.py")
    assert spec and spec.loader
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    pages.main(tmp_path / "sources")
    written = {path.relative_to(tmp_path / "sources").as_posix() for path in (tmp_path / "sources").rglob("*.*")}
    assert {"index.md", "README.md", "WORKSPACE.md", "docs/tour.md"} <= written
    text = "".join(path.read_text() for path in (tmp_path / "sources/reference").iterdir())
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "saejax").rglob("*.py")
    }
    assert modules == set(re.findall(r"automodule:: (\S+)", text))


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_guides_name_what_exists(path):
    text = path.read_text("utf-8")
    assert not HOSTS.search(text)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (path.parent / link).exists(), link
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_contributing_guide_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for name in re.findall(r"\b(?:tests|configs|saejax)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_hooks_and_workflow_use_what_the_environment_has():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks[0]["hooks"])
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["run"]["steps"][-1]["run"] == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_troubleshooting_page_quotes_lines_that_exist():
    """Each row's words stand in a string of the package."""
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "saejax").rglob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) > 20
    for words in quoted:
        assert words in source, words
