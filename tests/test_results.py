"""Results are written as JSON and read back as the same class; what does not fit is refused by file and field."""

import dataclasses
import importlib
import json
import runpy
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import pytest
import runs

import saejax
from saejax import loaded_units
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.errors import UserError
from saejax.files import write_json
from saejax.results import Interval, from_json, to_json
from saejax.runner import registry, stage
from saejax.runner.workspace import STACK, STARTED, SUMMARY


@dataclasses.dataclass(frozen=True)
class Part:
    name: Literal["zero", "random"]
    drop: Interval | None
    tokens: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Other:
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Whole:
    n: int
    share: float
    parts: Mapping[str, Part | Other]
    pools: Mapping[int, tuple[float, ...]]
    sizes: tuple[int | Literal["all"], ...]
    pair: tuple[int, str]
    asked: bool | None = None
    curve: Part | None = None


WHOLE = Whole(
    n=3,
    share=0.25,
    parts=dict(a=Part("zero", Interval(0.1, 0.0, 0.2), ("x",)), b=Part("random", None), c=Other("c", "too few")),
    pools={7: (0.5, 1.0)},
    sizes=(1, 2, "all"),
    pair=(1, "one"),
)


def test_what_is_written_is_read_back_as_it_was():
    data = json.loads(json.dumps(to_json(WHOLE)))
    assert from_json(Whole, data, "a.json") == WHOLE
    assert data["parts"]["b"] == dict(name="random", drop=None, tokens=[])  # null is written where it has no default
    assert set(data) == {"n", "share", "parts", "pools", "sizes", "pair"}  # and left out where it has
    assert from_json(Interval, dict(mean=1, low=0, high=2), "a.json") == Interval(1.0, 0.0, 2.0)
    assert from_json(Mapping[str, Part], dict(a=WHOLE.parts["a"]), "a.json")["a"] is WHOLE.parts["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("n"), "has no field n"),
        (lambda data: data.update(more=1), "has a field more that is unknown"),
        (lambda data: data["parts"]["a"]["drop"].pop("low"), "has no field parts.a.drop.low"),
        (lambda data: data["parts"]["b"].update(name="mean"), "has 'mean' in parts.b.name"),
        (lambda data: data.update(n=3.5), "has 3.5 in n, expected int"),
        (lambda data: data.update(n=True), "has True in n, expected int"),
        (lambda data: data.update(share=None), "has None in share, expected float"),
        (lambda data: data["sizes"].append("none"), "has 'none' in sizes[3]"),
        (lambda data: data.update(pair=[1]), "in pair"),
        (lambda data: data.update(parts=[]), "in parts"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_field(change, message):
    data = to_json(WHOLE)
    change(data)
    with pytest.raises(UserError, match=r"^runs/a\.json ") as refused:
        from_json(Whole, data, "runs/a.json")
    assert message in str(refused.value)


def write_summary(folder, results):
    about = dict(schema_version=1, stage="sample", name="", fingerprint="0" * 16, config={}, inputs={}, packages={})
    about |= dict(devices=None, seeds={}, start="2025-01-01T00:00:00+00:00", seconds=1.0, files={})
    folder.mkdir(parents=True)
    write_json(folder / SUMMARY, about | dict(results=results))


def test_results_of_a_unit_are_loaded_as_their_class(tmp_path, monkeypatch):
    sample = stage.Stage("sample", "a sample", print, (), results=Whole)
    monkeypatch.setitem(registry.all_stages(), "sample", sample)
    write_summary(tmp_path / "sample" / "a", to_json(WHOLE))
    assert saejax.load_results(tmp_path / "sample" / "a") == WHOLE == saejax.load_results(tmp_path, "sample/a")
    write_summary(tmp_path / "sample" / "b", dict(n=1))
    with pytest.raises(UserError, match=r"b/done\.json has no field results\.share"):
        saejax.load_results(tmp_path, "sample/b")
    with pytest.raises(UserError, match="does not exist"):
        saejax.load_results(tmp_path, "sample/c")


def test_a_folder_of_units_names_them(tmp_path):
    """As the tested dictionaries of ``ablate`` are folders in DIR/ablate."""
    for unit in ("ablate/topk-0123456789abcdef", "report-0123456789abcdef"):
        (tmp_path / unit).mkdir(parents=True)
        write_json(tmp_path / unit / SUMMARY, {})
        (tmp_path / unit.rpartition("-")[0]).symlink_to(tmp_path / unit)
    for folder, units in (("ablate", "ablate/topk, of topk$"), (".", "ablate/topk, of ablate/topk, report$")):
        with pytest.raises(UserError, match=f"expected the folder of a finished unit; name one, such as .*/{units}"):
            saejax.load_results(tmp_path / folder)
    (tmp_path / "report").unlink()
    with pytest.raises(UserError, match="of ablate/topk$"):  # the unit without its link is an earlier one
        saejax.load_results(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="run its stage, or name another$"):
        saejax.load_results(tmp_path / "nothing")


def test_the_pages_say_what_every_field_is(monkeypatch):
    """The site's pages of files have a place for every stage, and every field has a comment."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "docs")
    script = importlib.import_module("result_fields")
    assert script.documented_stages() == {name for name, stage in registry.all_stages().items() if stage.results}
    lines = "".join(script.fill_pages().values()).splitlines()
    assert sum("**CaptureResults**" in line for line in lines) == 1 and len(lines) > 1000
    assert not any(": ;" in line or line.endswith(":.") for line in lines)  # fields without a comment


def test_the_program_that_explains_fields(monkeypatch, capsys):
    script = str(Path(__file__).parent.parent / "docs/result_fields.py")
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # this process goes on
    monkeypatch.setattr(sys, "argv", [script, "study_run"])
    runpy.run_path(script, run_name="__main__")
    assert "**GateFigures**" in capsys.readouterr().out
    reader = f"{sys.executable} {script} {'study_run ' * 20} | head -1"  # more than a pipe holds
    first = subprocess.run(reader, shell=True, capture_output=True, text=True, check=True, cwd=runs.ROOT)
    assert first.stdout.startswith("- **StudyFigures**") and not first.stderr
    monkeypatch.setattr(sys, "argv", [script, "nothing"])
    with pytest.raises(SystemExit, match="^usage: "):  # a text: Python prints it, and the status is 1
        runpy.run_path(script, run_name="__main__")


def test_a_dictionary_and_results_of_another_one_are_not_mixed_in_silence(tmp_path, caplog, monkeypatch):
    """Whichever of them is loaded first; members of one stack go together."""
    monkeypatch.setattr(loaded_units, "_dictionaries", defaultdict(set))
    monkeypatch.setattr(loaded_units, "_results", defaultdict(set))
    sample = stage.Stage("sample", "a sample", print, (), results=Whole)
    monkeypatch.setitem(registry.all_stages(), "sample", sample)
    old, new = "0" * 16, "f" * 16
    config = DictionaryConfig(kind="topk", site="resid_post.0", d_in=4, n_features=8, k=2)
    for unit_hash in (old, new):
        folder = tmp_path / f"train/topk-{unit_hash}"
        save_dictionary(folder / "dictionary", Dictionary.initial(config, jax.random.key(0)))
    write_summary(tmp_path / "sample", to_json(WHOLE))
    write_json(tmp_path / "sample" / STARTED, dict(depends_on=dict(needs={"train/topk": old, "capture": new})))
    (tmp_path / "train/topk").symlink_to(f"topk-{old}")

    def load_both(link: str, *, results_first: bool) -> list[str]:
        caplog.clear()
        loaded_units._dictionaries.clear(), loaded_units._results.clear()
        (tmp_path / "train/topk").unlink()
        (tmp_path / "train/topk").symlink_to(f"topk-{old}")
        loads = [lambda: saejax.load_results(tmp_path / "sample"), lambda: saejax.load_dictionary(tmp_path / link)]
        for load in loads if results_first else reversed(loads):
            load()
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    for results_first in (True, False):
        assert load_both("train/topk", results_first=results_first) == []
        (warning,) = load_both(f"train/topk-{new}/dictionary", results_first=results_first)
        assert f"the dictionary topk-{new} and results of topk-{old} were loaded" in warning
    (tmp_path / "train/topk-1").mkdir()
    write_json(tmp_path / "train/topk-1" / STACK, dict(members=dict(k2=f"topk-{old}", k4=f"topk-{new}")))
    assert load_both(f"train/topk-{new}", results_first=True) == []
    (tmp_path / "train/topk").unlink()
    (tmp_path / "train/topk").symlink_to(f"topk-{new}")
    saejax.load_results(tmp_path / "sample")
    assert f"topk-{old}, which {tmp_path}/train/topk has no more" in caplog.records[-1].message
