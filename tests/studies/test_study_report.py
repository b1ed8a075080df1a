"""The report of a study: all its figures are in the JSON beside it, and it can be read on a phone and on paper."""

import csv
import dataclasses
import itertools
import json
import typing

import pytest
from browser import find_cut_off, needs_chromium

from saejax.results import Interval, from_json
from saejax.studies.report import write_report
from saejax.studies.results import TABLES, StudyFigures
from saejax.studies.sheet import duration

WORDS = "smollm2-135m-bfloat16"


def made_up(hint, counter):
    """A value of a field's type; no two numbers alike."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        return tuple(made_up(typing.get_args(hint)[0], counter) for _ in range(3))
    if typing.get_args(hint):  # X | None
        return made_up(typing.get_args(hint)[0], counter)
    if hint is Interval:
        mean = next(counter) / 1000
        return Interval(mean, mean - 0.1234, mean + 0.1234)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{field.name: made_up(hints[field.name], counter) for field in dataclasses.fields(hint)})
    return {str: WORDS, bool: True, int: next(counter), float: next(counter) / 1000}[hint]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_report(folder, made_up(StudyFigures, itertools.count(1001)))
    return folder


def test_page_and_text_say_nothing_that_is_not_in_the_json(study, tmp_path):
    """They are the same when they are written again from that file alone."""
    figures = from_json(StudyFigures, json.loads((study / "study.json").read_text()), "study.json")
    write_report(tmp_path, figures)
    for name in ("index.html", "study.md"):
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes()
    changed = dataclasses.replace(figures.baselines[0], n=987654)
    write_report(tmp_path, dataclasses.replace(figures, baselines=(changed,)))
    assert "987654" in (tmp_path / "index.html").read_text().replace(",", "")


def test_every_table_is_a_file(study):
    assert [duration(seconds) for seconds in (61, 600, 7200)] == ["61 s", "10 min", "2.0 h"]
    figures = json.loads((study / "study.json").read_text())
    assert set(TABLES) == {name for name, rows in figures.items() if rows and isinstance(rows[0], dict)}
    files = set(TABLES) - {"learned", "failures"}  # of words
    assert {path.stem for path in (study / "tables").iterdir()} == files
    for name in files:
        with (study / "tables" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(figures[name]) == 3
        for row, told in zip(rows, figures[name], strict=True):
            plain = {key: value for key, value in told.items() if isinstance(value, int | float | str)}
            assert {key: row[key] for key in plain} == {key: str(value) for key, value in plain.items()}


def test_a_page_says_nothing_about_what_was_not_run(tmp_path):
    """All rows have failed, or only trained."""
    every = made_up(StudyFigures, itertools.count(1001))
    nothing = dataclasses.replace(every, **dict.fromkeys(TABLES, ()))
    untested = tuple(dataclasses.replace(each, agree=None) for each in every.associations)
    for name, figures in (
        ("failed", dataclasses.replace(nothing, failures=every.failures)),
        ("trained", dataclasses.replace(nothing, dictionaries=every.dictionaries)),
        ("tested", dataclasses.replace(nothing, labels=every.labels, associations=untested)),
    ):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, figures)
        page = (tmp_path / name / "study.md").read_text()
        assert "0 of 0" not in page
        assert "No group of features was stable" not in page


@needs_chromium
@pytest.mark.parametrize(("media", "width"), [("screen", 360), ("print", 718)], ids=["phone", "paper"])
def test_nothing_is_cut_off(study, tmp_path, media, width):
    """On paper nothing scrolls, so tables fit too; A4 within margins of a centimetre has 718 pixels."""
    assert find_cut_off(study / "index.html", tmp_path / "profile", media, width) == []
