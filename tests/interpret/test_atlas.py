"""The atlas in a real browser, labels given by hand, and what is refused."""

import csv
import gzip
import json
from unittest import mock

import pytest
import runs
from browser import chromium, needs_chromium
from made_up_records import BAD, made_up_record

from saejax.dictionaries.labels import FOUND, Label
from saejax.errors import UserError
from saejax.files import write_json
from saejax.interpret.labels import label_files, read_explanations, read_labels, unused_lines
from saejax.interpret.review import write_sheets
from saejax.interventions.answers import FeatureEffect
from saejax.results import Interval, to_json
from saejax.runner.labels import labels_in, labels_of
from saejax.stages.atlas.run import write_atlas
from saejax.stages.atlas.stage import ATLAS
from saejax.stages.transfer.inputs import find_names

LABELS = {1: Label("“ Paris”", FOUND, f1=0.9), 2: Label(f"a city {BAD}", "Ada", "seen & checked")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    records = [made_up_record(i, fires=0 if i == 5 else 12 + i) for i in range(70)]
    one = dict(document=8, tokens=["The", BAD, " c\n"], features=[1, 2], acts=[[0.0, 4.0, None], [1.0, 0.5, 0.0]])
    maps = [one, one | dict(document=9)]
    write_atlas(folder, "topk/resid_post.5", records, LABELS, {1: dict(capital=1.25)}, maps)
    return (folder / "index.html").as_uri()


def show(browser, page, feature):
    browser.open(f"{page}#topk/resid_post.5/{feature}")
    browser.wait(f"atlas.painted === {json.dumps(feature)}")
    browser.settle()


def text(browser, selector):
    return browser.js(f"document.querySelector({json.dumps(selector)}).innerText")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(400, False), (1300, True)])
def test_a_feature_the_overview_and_heatmaps_are_shown(browser, page, dark, width):
    fits = "document.documentElement.scrollWidth <= innerWidth"
    browser.view(width, 900, dark=dark, phone=width == 400)
    show(browser, page, 1)
    shown = text(browser, "#feature")
    assert "Feature 1" in shown and "“ Paris” (by detector)" in shown and "1.25 logits lost" in shown
    assert BAD in shown and "0.80 [0.70, 0.90]" in shown  # shown, not run
    assert browser.js("document.querySelectorAll('#feature .context').length") == 4 and browser.js(fits)
    colours = browser.js("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    light = [sum(map(int, colour.strip("rgba()").split(",")[:3])) for colour in colours]
    assert (light[0] > light[1]) == dark and abs(light[0] - light[1]) > 400 and browser.errors == []

    browser.open(page)  # on an overview: not on an empty pane, nor by the features' numbers
    browser.wait("atlas.painted === 'overview'")
    shown = text(browser, "#feature")
    assert "69 of 70 (98.6 %)" in shown and "2 of 70 (2.86 %)" in shown and "… by Ada" in shown
    rows = "[...t.querySelectorAll('tbody tr')].map(r => r.innerText)"
    effects, best = browser.js(f"[...document.querySelectorAll('#feature table')].map(t => {rows})")
    assert len(effects) == 1 and effects[0].startswith("1 “ Paris”") and "1.25" in effects[0] and len(best) == 2
    bars = browser.js("[...document.querySelectorAll('#feature .bars i')].map(bar => Number(bar.title))")
    assert sum(bars) == 69 and browser.js("document.querySelector('#list a').dataset.feature") == "1"
    assert browser.js(fits) and browser.errors == []
    wide = "Array.from({length: 200000}, (_, i) => 1 / (i + 1))"  # no list of features is too long for it
    columns = f"(rate => ({{rate, label: rate.map(() => ''), by: [], words: [], effect: [], f1: []}}))({wide})"
    counted = f"overviewPage({{dictionary: 'wide', columns: {columns}}}, () => '').querySelectorAll('.bars i')"
    titles = browser.js(f"[...{counted}].map(bar => bar.title)")
    assert sum(int(title.replace(",", "")) for title in titles) == 200_000

    show(browser, page, "maps")
    browser.wait("document.querySelectorAll('#feature table').length === 2")
    shown = browser.js("[...document.querySelectorAll('#feature td.cell')].slice(0, 6).map(c => "
                       "[c.style.getPropertyValue('--share'), c.title])")  # fmt: skip
    assert [share for share, _ in shown] == ["0", "1", "0", "1", "0.5", "0"]
    assert shown[1][1] == f"1 on {BAD}: 4" and shown[2][1].endswith("not scored")
    assert browser.js("document.querySelector('#feature th a').getAttribute('href')") == "#topk/resid_post.5/1"
    assert browser.js(fits) and browser.errors == []


@needs_chromium
def test_the_keyboard_finds_and_steps_through_features(browser, page):
    browser.view(1300, 900)
    show(browser, page, 33)
    browser.key("ArrowRight")
    browser.wait("atlas.painted === 34")
    browser.key("/")
    browser.type("a CITY")
    assert text(browser, "#count") == "1 of 70"
    browser.key("Enter")
    browser.wait("atlas.painted === 2")
    assert f"a city {BAD} (by Ada: seen & checked)" in text(browser, "#feature")
    browser.js("document.getElementById('sort').value = 'effect', document.getElementById('search').value = '';"
               "document.getElementById('sort').dispatchEvent(new Event('change'))")  # fmt: skip
    assert browser.js("document.querySelector('#list a').dataset.feature") == "1"
    show(browser, page, 5)
    assert "0 tokens" in text(browser, "#feature") and "never fires" in text(browser, "#list a[data-feature='6']") + \
        text(browser, "#list a[data-feature='5']")  # fmt: skip
    browser.js("location.hash = '#topk/resid_post.5/999'")
    browser.wait("document.getElementById('feature').innerText.includes('no feature')")
    assert browser.errors == []


@needs_chromium
def test_a_missing_file_is_told_where_it_was_asked_for(browser, tmp_path):
    """Not on another page that was opened before its end was known."""
    one = dict(document=8, tokens=["The"], features=[0], acts=[[1.0]])
    write_atlas(tmp_path, "topk", [made_up_record(0)], {}, {}, [one])
    (tmp_path / "data" / "00000.js").unlink()
    browser.open(f"{(tmp_path / 'index.html').as_uri()}#topk/0")
    browser.wait("document.getElementById('feature').innerText.includes('00000.js is missing')")
    browser.js("location.hash = '#topk/overview'")
    browser.wait("atlas.painted === 'overview'")
    browser.js(
        """(() => {
          document.head.append = (script) => {
            delete document.head.append;
            window.release = () => new Promise((done) => {
              script.addEventListener('error', () => done(true));
              document.head.append(script);
            });
          };
          location.hash = '#topk/0';
        })()"""
    )
    browser.wait("window.release")
    browser.js("location.hash = '#topk/maps'")
    browser.wait("document.querySelector('#feature .heat')")
    assert browser.js("release()") and browser.js("document.querySelectorAll('#feature .heat').length") == 1


@needs_chromium
@pytest.mark.slow
def test_a_hundred_thousand_features(browser, tmp_path):
    write_atlas(tmp_path, "wide", (made_up_record(i) for i in range(100_000)), LABELS, {})
    browser.view(1300, 900)
    browser.open(f"{(tmp_path / 'index.html').as_uri()}#wide/99999")
    browser.wait("atlas.painted === 99999")
    browser.settle()
    assert browser.js("document.getElementById('maps').hidden") and "Feature 99999" in text(browser, "#feature")


HEAD = b"feature,label,note,reviewer\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "not a .csv file in UTF-8"),
        (b"feature,label\n1,a\n", "no column note, reviewer"),
        (HEAD + b"9,a,,\n", "line 2: there is no feature '9' in topk: expected 0 to 8"),
        (HEAD + b"x,a,,\n", "there is no feature 'x'"),
        (HEAD + b"9" * 5000 + b",a,,\n", "there is no feature '999"),
        (HEAD + b"1,a,,\n1,b,,\n", "line 3: feature 1 is 'b', and 'a' in an earlier line"),
        (HEAD + b"1,a\n", "line 2 has not as many cells"),
        (HEAD + b"9,a,,\n1,b,,\nx,c,,\n", "2 lines are no labels: line 2: there is no feature '9' .*; line 4: .*'x'"),
    ],
)
def test_labels_that_are_refused(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_labels(path, "topk", 9, False)
    path.write_bytes(HEAD + b'3,"a, b",sure,Ada\n7,,nothing,Bo\n8,cat,,\n')
    assert read_labels(path, "topk", 9, False) == {3: Label("a, b", "Ada", "sure"), 8: Label("cat", "by hand")}


def test_explanations_from_neuronpedia(tmp_path):
    """The best of a feature's explanations, from files as exported; other files of the folder are left alone."""
    folder = tmp_path / "explanations"
    folder.mkdir()
    first = dict(layer="6-res-jb", index="3", description="rivers", explanationModelName="gpt-4o", scoreV2=0.4)
    lines = [
        first,
        first | dict(description="lakes", scoreV2=0.7),
        first | dict(index=5, description=" ", scoreV2=0.9),
        first | dict(index=5, description="seas", scoreV2=None),
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "batch-0.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "own.csv").write_bytes(HEAD)
    sheets, exported = label_files(folder)
    assert [path.name for path in sheets] == ["own.csv"]
    by = "Neuronpedia, gpt-4o"
    assert read_explanations(exported, 9) == {3: Label("lakes", by), 5: Label("seas", by)}
    for line, message in (
        (first | dict(layer="7-res-jb"), r"several dictionaries .6-res-jb, 7-res-jb.: name the files of one"),
        (first | dict(index="9"), "line 1: there is no feature 9: expected 0 to 8"),
        (dict(index=1), "line 1 is no explanation"),
        (
            [dict(index=1), "no JSON", first | dict(index="9")],
            "3 lines are no explanations: line 1 .*; line 2 .*; line 3",
        ),
    ):
        lines = line if isinstance(line, list) else [line]
        text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
        (folder / "batch-1.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_explanations(label_files(folder)[1], 9)


def test_sheets_for_review(tmp_path):
    """The top features of a behaviour with contexts and automatic labels; a filled copy is a file of labels."""
    effect, folder = Interval(1.25, 1.0, 1.5), tmp_path / "review"
    one, two = (FeatureEffect(i, 1.0, effect, 0.5, 2.0) for i in (1, 2))
    top, records = dict(capital=(one, two), plural=(two,)), {i: made_up_record(i) for i in (1, 2)}
    counts = write_sheets(folder, "topk", top, records, {1: LABELS[1]}, {2: Label("cats", "Ada", "sure")})
    assert [(each.behaviour, each.reviewed, each.features) for each in counts] == [("capital", 1, 2), ("plural", 1, 1)]
    text = (folder / "capital.csv").read_text()
    first, second = csv.DictReader(text.splitlines(keepends=True))
    assert first["feature"] == "1" and first["label"] == "" and first["automatic_label"] == "“ Paris” (by detector)"
    assert first["logits_lost"] == "1.250" and first["context_1"].startswith("The city") and BAD in first["context_1"]
    assert (second["label"], second["note"], second["reviewer"]) == ("cats", "sure", "Ada")
    assert read_labels(folder, "topk", 9, True) == {2: Label("cats", "Ada", "sure")}
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing is a folder without .csv files"):
        read_labels(tmp_path / "nothing", "topk", 9, True)
    (folder / "capital.csv").write_text(text.replace(",cats,", ",dogs,"))
    with pytest.raises(UserError, match=r"plural.csv, line 2: feature 2 is 'cats', and 'dogs' in an earlier line"):
        read_labels(folder, "topk", 9, True)
    path = tmp_path / "labels.csv"
    path.write_text("feature,label,note,reviewer,dictionary\n3,a,,Ada,topk/k8\n3,b,,Ada,topk/k16\n")
    assert read_labels(path, "topk/k16", 9, True)[3].label == "b"


def test_lines_of_no_dictionary_are_named(tmp_path):
    path = tmp_path / "labels.csv"
    names = ("topk/k8", " topk/k16 ", "tpok/k8", "topk/k9", "gated", "")
    lines = [f"3,{'' if name == 'topk/k9' else 'a'},,Ada,{name}\n" for name in names]
    path.write_text("feature,label,note,reviewer,dictionary\n" + "".join(lines))
    assert read_labels(path, "topk/k16", 9, True).keys() == {3}  # spaces around a name mean nothing
    assert unused_lines(path, ["topk/k8", "topk/k16"], ["gated"]) == ["labels.csv, line 4 (tpok/k8)"]
    assert len(unused_lines(path, ["topk/k8"], [])) == 3


def test_where_labels_are_asked_for(tmp_path):
    assert labels_of(tmp_path, "topk/k8") == {}
    for stage, label in (("interpret", Label("found", FOUND, f1=0.5)), ("atlas", Label("mine", "Ada"))):
        folder = tmp_path / stage / "topk" / "k8"
        folder.mkdir(parents=True)
        write_json(folder / "labels.json", {"4": to_json(label)})
        assert labels_of(tmp_path, "topk/k8") == {4: label}
    assert labels_in({"capture": tmp_path / "capture"}, "topk/k8") == {}  # not interpreted in the run that asks
    units = {"interpret/topk": tmp_path / "interpret" / "topk"}
    assert labels_in(units, "topk/k8") == {4: label}
    # A defect: a run that reads an earlier atlas showed the labels of the one that DIR/atlas/topk stands for by now.
    earlier = tmp_path / "atlas" / f"topk-{16 * 'a'}"
    (earlier / "k8").mkdir(parents=True)
    write_json(earlier / "k8" / "labels.json", {"4": to_json(Label("before", "Ada"))})
    assert labels_in(units | {"atlas/topk": earlier}, "topk/k8") == {4: Label("before", "Ada")}
    entry = mock.Mock(folder=tmp_path)
    entry.name = "topk/k8"
    run = mock.Mock(folder=tmp_path / f"cluster-{16 * 'b'}", inputs={"atlas/topk": earlier})
    assert find_names(entry, run) == {4: "before"}


def test_pages_with_labels_are_written_anew_where_labels_have_to_name_their_dictionary(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("feature,label,note,reviewer\n")

    def mark(labels, kinds):
        configs = runs.make_configs(interpret__dictionaries=kinds, atlas__labels=labels)
        return [read(configs) for read in ATLAS.inputs(configs, "topk").values() if callable(read)]

    assert mark(str(path), ("topk",)) != mark(str(path), ("topk", "standard"))
    assert mark("", ("topk",)) == mark("", ("topk", "standard"))
