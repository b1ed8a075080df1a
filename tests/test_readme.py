"""The README's Python example runs as it stands, and the guides name what exists."""

import re
import shlex
import tomllib
import types
from pathlib import Path

import jax
import pytest
from absl import flags

import saejax
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.runner import command_line, config
from saejax.runner.registry import GROUPS, STAGES

README = Path(__file__).parent.parent / "README.md"
# docs/extending.md names files that a reader makes; tests/test_extending.py and tests/test_stages.py run what it says.
GUIDES = ["README.md", "WORKSPACE.md", "CONTRIBUTING.md"]
GUIDES += sorted(f"docs/{path.name}" for path in README.parent.glob("docs/*.md") if path.name != "extending.md")


def test_the_python_example_runs(tmp_path, monkeypatch, capsys, smollm2):
    """On a random dictionary in place of the demo's, which takes minutes to train."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    described = DictionaryConfig(kind="topk", site="resid_post.15", d_in=576, n_features=1152, k=48, max_norm=1600.0)
    dictionary = Dictionary.initial(described, jax.random.key(0))
    save_dictionary(tmp_path / "runs/demo/train/topk/dictionary", dictionary)
    top = types.SimpleNamespace(top=dict(capital=[types.SimpleNamespace(feature=feature) for feature in range(200)]))
    monkeypatch.setattr("saejax.results.load_results", lambda folder: top)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    before, after = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    output = smollm2(names["tokens"])
    assert before == pytest.approx(float(output.logit("Paris") - output.logit("Rome")), abs=1e-3)
    assert before != after


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_name_only_files_and_commands_that_exist(guide):
    root = README.parent
    text = (root / guide).read_text()
    for path in re.findall(r"(?:configs|docs|scripts|saejax)/[\w./]+\.\w+", text):
        assert (root / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (root / "Makefile").read_text(), re.MULTILINE), target
    for binary in re.findall(r"experiments\.(?!py\b)(\w+)", text):
        assert (root / "experiments" / f"{binary}.py").exists(), binary


@pytest.mark.parametrize("guide", GUIDES)
def test_flags_and_names_of_the_guides_exist(guide):
    """Every --group.field is a flag, every saejax.name a name of the library, every command one of the package."""
    text = (README.parent / guide).read_text()
    scripts = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["scripts"]
    known = flags.FlagValues()
    config.define_flags(GROUPS, known)
    for flag in re.findall(r"--(\w+(?:\.\w+)+)", text):
        assert flag in known, flag
    for name in re.findall(r"(?<![\w/.-])saejax\.(\w+)\(", text):
        assert name in saejax.__all__, name
    for command in re.findall(r"\bsaejax-[a-z]+\b", text):
        assert command in scripts, command


@pytest.mark.parametrize("guide", GUIDES)
def test_command_lines_of_the_guides_are_read(guide, tmp_path):
    """As far as flags go: their names, ranges and choices, whether their binary takes them, and the files they name."""
    text = (README.parent / guide).read_text().replace("\\\n", " ")
    # The reader's own flag file is the block of flags that stands before the commands.
    (tmp_path / "mine.flags").write_text("".join(re.findall(r"^```\n((?:--.*\n)+)```$", text, re.MULTILINE)))
    several = dict(baseline=["baseline", "benchmark"], pipeline=list(STAGES))
    for binary, line in re.findall(r"^\.venv/bin/python -m experiments\.(\w+) (.*)$", text, re.MULTILINE):
        if binary not in ("study_run", "serve", "compare"):
            words = shlex.split(
                line.replace("=configs/", f"={README.parent}/configs/").replace(
                    "=mine.flags", f"={tmp_path}/mine.flags"
                ),
                comments=True,
            )
            command_line.read_configs(command_line.stage_flags(), ["program", *words], several.get(binary, [binary]))
