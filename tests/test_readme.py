"""The README's Python example runs as it stands."""

import json
import re
from pathlib import Path

import jax
import pytest

from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys, smollm2):
    """On a random dictionary in place of the demo's, which takes minutes to train."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    config = DictionaryConfig(kind="topk", site="resid_post.15", d_in=576, n_features=1152, k=48, max_norm=1600.0)
    dictionary = Dictionary.initial(config, jax.random.key(0))
    save_dictionary(tmp_path / "runs/demo/train/topk/dictionary", dictionary)
    (tmp_path / "runs/demo/ablate/topk").mkdir(parents=True)
    entries = [dict(feature=feature) for feature in range(200)]
    (tmp_path / "runs/demo/ablate/topk/capital.json").write_text(json.dumps(dict(top=entries)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    before, after = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    output = smollm2(names["tokens"])
    assert before == pytest.approx(float(output.logit("Paris") - output.logit("Rome")), abs=1e-3)
    assert before != after


def test_the_readme_names_only_what_exists():
    text = README.read_text()
    root = README.parent
    for path in re.findall(r"(?:configs|docs|scripts|saejax)/[\w./]+\.\w+", text):
        assert (root / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (root / "Makefile").read_text(), re.MULTILINE), target
    for binary in re.findall(r"experiments\.(\w+)", text):
        assert (root / "experiments" / f"{binary}.py").exists(), binary
