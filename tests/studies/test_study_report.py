"""The report of a study: all its figures are in the JSON beside it, and it can be read on a phone and on paper."""

import collections.abc
import csv
import dataclasses
import itertools
import json
import typing

import pytest
from browser import find_cut_off, needs_chromium

from saejax.results import Interval, from_json
from saejax.studies.report import _lead, trend_sentence, write_report
from saejax.studies.results import TABLES, StudyFigures
from saejax.studies.sheet import as_csv, duration

WORDS = "smollm2-135m-bfloat16"


def made_up(hint, counter):
    """A value of a field's type; no two numbers alike."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[0]
    if typing.get_origin(hint) in (dict, collections.abc.Mapping):
        return {key: made_up(typing.get_args(hint)[1], counter) for key in ("tested", "sums")}
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
    return {str: WORDS, typing.Any: WORDS, bool: True, int: next(counter), float: next(counter) / 1000}[hint]


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


def test_intervals_that_are_not_known_are_three_empty_columns():
    (effect,) = made_up(StudyFigures, itertools.count(1)).effects[:1]
    known, unknown = (as_csv([dataclasses.replace(effect, nats_drop=value)]) for value in (effect.nats_drop, None))
    assert known.splitlines()[0] == unknown.splitlines()[0]
    (row,) = csv.DictReader(unknown.splitlines())
    assert {row[f"nats_drop.{end}"] for end in ("mean", "low", "high")} == {""} and "nats_drop" not in row
    assert row["accuracy_drop.low"] == str(effect.accuracy_drop.low)


def test_sentences_about_rows():
    """Every site of a row's text counts; of one row nothing is the smallest; without skipped units none is named."""
    figures = made_up(StudyFigures, itertools.count(1))
    dictionaries = [dataclasses.replace(figures.dictionaries[0], row=row, explained_variance=share)
                    for row, share in (("a", 0.8), ("a", 0.6), ("b", 0.5))]  # fmt: skip
    corpus = dataclasses.replace(figures.activations[0], row="a", text="corpus")
    sites = [dataclasses.replace(corpus, site=f"resid_post.{norm}", median_norm=norm) for norm in (9, 2, 4)]
    both = dataclasses.replace(figures, dictionaries=tuple(dictionaries), activations=tuple(sites))
    assert trend_sentence(both) == (
        "The mean normalised error is 0.30 in a, the smallest, and 0.50 in b, the largest. The median norm of "
        "activations ranges from 2 (a, corpus, resid_post.2) to 9 (a, corpus, resid_post.9)."
    )
    one = dataclasses.replace(both, dictionaries=both.dictionaries[:2], activations=both.activations[:1])
    assert trend_sentence(one) == "The mean normalised error is 0.30 in a."
    failed = dataclasses.replace(figures.failures[0], state="failed")
    skipped = dataclasses.replace(failed, state="not run")
    for failures, words in (((failed,), "done: 1 unit failed; the"), ((failed, skipped), "1 unit failed, and 1 that")):
        assert words in _lead(dataclasses.replace(figures, failures=failures))[-1]


@needs_chromium
@pytest.mark.parametrize(("media", "width"), [("screen", 360), ("print", 718)], ids=["phone", "paper"])
def test_nothing_is_cut_off(study, tmp_path, media, width):
    """On paper nothing scrolls, so tables fit too; A4 within margins of a centimetre has 718 pixels."""
    assert find_cut_off(study / "index.html", tmp_path / "profile", media, width) == []
