"""The stage ``track`` as a program on a tiny model, its page in a real browser, and what is refused."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

sys.path.append(str(Path(__file__).parent.parent / "attribution"))
from browser import CHROMIUM, chromium

from saejax import load_dictionary, load_model, load_results
from saejax.files import write_json
from saejax.matching.track.firings import follow
from saejax.matching.track.measured import measure_chains
from saejax.matching.track.page import ShownText, write_page
from saejax.matching.track.report import sections
from saejax.matching.track.results import MeasuredChain, MeasuredLink
from saejax.models.tokens import pad
from saejax.results import from_json
from saejax.runner import command

pytestmark = pytest.mark.usefixtures("single_device")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")
BAD = "</script><script>alert(1)</script>"
PROMPTS = [
    dict(slug="river", prompt="How many rivers?", solution="There are 3 rivers. Then 4 more come. So 7.", answer=" 7"),
    dict(slug="bad", prompt=f"See {BAD} here. 我有三个苹果。还剩几个？"),
]


@pytest.fixture(scope="module")
def tracked(inputs, tmp_path_factory):
    """A workdir with a stack of both layers and two texts that were followed; and the flags of its run."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    flags = runs.small_flags(
        *inputs, folder / "run", train__kinds="topk", train__sites="resid_post.0,resid_post.1", train__k=4,
        train__source="model", train__epochs=1, track__prompts=folder / "prompts.jsonl", track__dictionaries="topk",
        task__train_prompts=2, task__test_prompts=2,
    )  # fmt: skip
    assert command.run(["baseline", "train"], "", ["test", *flags]) == 0
    labels = folder / "run" / "atlas" / "topk" / "resid_post.1"
    labels.mkdir(parents=True)
    named = {str(feature): dict(label=f"all {BAD}", by="Ada", note="", f1=None) for feature in range(128)}
    write_json(labels / "labels.json", named)
    assert command.run(["track"], "", ["test", *flags]) == 0
    return folder, flags


def test_links_are_measured_as_the_library_does(tracked, inputs):
    """A feature is ablated at a position by the public edit; controls take away as much along other active features."""
    folder, _ = tracked
    lm = load_model(str(inputs[0]), dtype="float32")
    pair = [load_dictionary(str(folder / "run" / "train" / "topk" / f"resid_post.{i}")) for i in range(2)]
    layers = [SimpleNamespace(reads=one.site, name="", config=one.config, load=lambda one=one: one) for one in pair]
    stack, ids_T = layers, np.arange(5, 17)
    firings = follow(lm, stack, ids_T)
    low, high = (each.at(9) for each in firings)
    link = (0, 9, int(low.feature_A[0])), (1, 9, int(high.feature_A[0])), 1.0
    (measured,) = measure_chains(lm, stack, ids_T, 3, [link], firings, str, 0)
    (found,) = measured.links
    tokens = pad([ids_T.tolist()])
    runs_of = [
        [lm(tokens, capture=["resid_post.1"], edits=edits) for edits in ([], [one.ablate([node[2]], (9, 10))])]
        for one, node in zip(pair, link, strict=False)
    ]
    clean, edited = (float(pair[1].encode(run.sites["resid_post.1"])[0, 9, found.target]) for run in runs_of[0])
    assert found.lost == pytest.approx(1 - edited / clean, abs=1e-3)
    logp = [jax.nn.log_softmax(run.logits_BxTxV[0, -1])[3] for run in runs_of[1]]
    assert found.answer_drop == pytest.approx(float(logp[0] - logp[1]), abs=1e-4)
    # The lowest feature's effect on the answer.
    output = lm(tokens, edits=[pair[0].ablate([link[0][2]], (9, 10))])
    without = float(jax.nn.log_softmax(output.logits_BxTxV[0, -1])[3])
    assert measured.answer_drop == pytest.approx(float(logp[0]) - without, abs=1e-4)
    # Four features fire (k = 4): three controls, too few to decide.
    assert found.controls == 3 and not found.holds and not found.reaches_answer
    assert not measured.holds


def test_texts_are_followed_and_kept(tracked, capsys):
    folder, flags = tracked
    unit = folder / "run" / "track" / "prompts"
    results = load_results(unit)
    river = results.texts["river"]
    assert list(results.texts) == ["river", "bad"] and river.sites == ("resid_post.0", "resid_post.1")
    assert [step.name for step in river.steps] == ["prompt", "step 1", "step 2", "step 3"]
    assert river.answer == " 7" or river.answer == "7"
    assert len(river.lens.answer) == 2 and river.tested == "resid_post.1"
    assert all((step.test is None) == bool(step.untested) for step in river.steps[1:])
    cells = json.loads((unit / "river-cells.json").read_text())
    assert len(cells["cells"]) == 2 and {len(row) for row in cells["cells"]} == {river.tokens}
    assert all(len(cell) <= 8 and cell[1::2] == sorted(cell[1::2], reverse=True) for r in cells["cells"] for cell in r)
    text = (unit / "track.txt").read_text()
    assert "river:" in text and "  resid_post.1  " in text and "\033" not in text
    found = SimpleNamespace(each=lambda kind: {"prompts": results}, folders={"track/prompts": unit}, address=str)
    (section,) = sections(found, None)
    assert "river" in "\n".join(block.markdown() for block in section.blocks)
    assert command.run(["track"], "", ["test", *flags]) == 0
    assert "done before, unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(track__dictionaries=""), "--track.dictionaries is missing"),
        (dict(track__dictionaries="/nowhere/at/all"), "/nowhere/at/all"),
        (dict(track__dictionaries="topk/resid_post.0,topk/resid_post.0"), "are both of layer 0"),
        (dict(track__dictionaries="topk/resid_post.7"), "resid_post.7"),
        (dict(track__prompt="both"), "expected one of them"),
    ],
)
def test_what_is_refused_in_one_line(tracked, tmp_path, capsys, changes, said):
    _, flags = tracked
    more = [f"--{name.replace('__', '.')}={value}" for name, value in changes.items()]
    assert command.run(["track"], "", ["test", *flags, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def follow_sentence(tracked, workdir, layers, *more):
    """What is found of one sentence by dictionaries that are given by their folders."""
    folder, flags = tracked
    folders = ",".join(str(folder / "run" / "train" / "topk" / f"resid_post.{i}") for i in range(layers))
    flags = [*flags, "--track.prompts=", "--track.prompt=The river", f"--track.dictionaries={folders}", *more]
    assert command.run(["track"], "", ["test", *flags, f"--workdir={workdir}"]) == 0
    (found,) = load_results(workdir / "track" / "The-river").texts.values()
    return found


def test_one_sentence_at_one_layer_and_the_output_of_the_model(tracked, inputs, tmp_path):
    found = follow_sentence(tracked, tmp_path / "one", 1)
    assert found.links == 0 and [step.name for step in found.steps] == ["step 1"]
    lm = load_model(str(inputs[0]), dtype="float32")
    (written,) = lm.generate(lm.tokenize(["The river"]), 6)
    found = follow_sentence(tracked, tmp_path / "two", 2, "--track.generate=6")
    assert found.output == written.text.strip() and found.steps[0].name == "prompt"
    assert "".join(step.text for step in found.steps[1:]).replace(" ", "") == found.output.replace(" ", "")
    assert "  output           " in (tmp_path / "two" / "track" / "The-river" / "track.txt").read_text()


def write_page_with_a_chain(unit, page):
    """Write the page of a unit again, its first text with a measured chain: untrained features have no links."""
    results = load_results(unit)
    files = {slug: unit / f"{slug}-cells.json" for slug in results.texts}
    cells = {slug: from_json(ShownText, json.loads(path.read_text()), path) for slug, path in files.items()}
    (low, *_), (high, *_) = (next(cell for cell in row if cell) for row in cells["river"].cells)
    link = MeasuredLink(
        lower="resid_post.0", source=low, upper="resid_post.1", target=high, position=1, token="How", weight=0.5,
        lost=0.75, random_lost=0.12, answer_drop=0.3, random_drop=0.01, controls=5, holds=True, reaches_answer=True,
    )  # fmt: skip
    chain = MeasuredChain((link,), answer_drop=0.2, random_drop=0.3, reaches_answer=False, holds=False)
    texts = dict(results.texts) | dict(river=dataclasses.replace(results.texts["river"], chains=(chain,)))
    write_page(page, dataclasses.replace(results, texts=texts), cells, "tiny")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(400, False), (1300, True)])
def test_the_page(tracked, tmp_path, width, dark):
    page = tmp_path / "index.html"
    write_page_with_a_chain(tracked[0] / "run" / "track" / "prompts", page)
    with chromium(tmp_path / "profile") as browser:
        browser.view(width, 900, dark=dark, phone=width == 400)
        browser.open(page.as_uri())
        browser.wait("document.body.dataset.ready === 'true'")
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        shown = browser.js("document.body.innerText")
        assert BAD in shown and "我有三个苹果" in shown and "similarity of their directions" in shown
        assert "Chains of features, measured" in shown and "loses 75 %, 12 % with random features (holds)" in shown
        assert "The chain does not hold." in shown
        browser.js("document.querySelector('.scroll').focus()")
        for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
            browser.key(key)
        panel = "document.querySelector('.panel').innerText"
        assert "resid_post.1, position 1" in browser.js(panel) and "logit lens" in browser.js(panel)
        assert f"all {BAD}" in browser.js(panel)
        browser.key("Enter")
        browser.js("document.activeElement.click()")
        assert "Following" in browser.js(panel)
        assert int(browser.js("document.querySelector('canvas').dataset.marked")) >= 1
        browser.js("document.querySelector('.panel button').focus()")
        browser.key("Escape")
        assert "Following" not in browser.js(panel) and browser.errors == []
