"""The stage ``track`` as a program on a tiny model, its page in a real browser, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import settings_read
import trained_stack
from browser import chromium, needs_chromium

from saejax import load_dictionary, load_model, load_results
from saejax.files import write_json
from saejax.interpret.jacobian_lens import JacobianLens
from saejax.matching.track.firings import follow
from saejax.matching.track.measured import _all, measure_chains
from saejax.matching.track.results import MeasuredChain, MeasuredLink, TrackResults
from saejax.matching.track.settings import TrackConfig
from saejax.models.tokens import pad
from saejax.runner import command
from saejax.runner.registry import all_stages, default_configs
from saejax.stages.track.page import summary, write_page
from saejax.stages.track.report import sections

pytestmark = pytest.mark.usefixtures("single_device")
NAMES = ["topk/resid_post.0-k4", "topk/resid_post.1-k4"]
BAD = "</script><script>alert(1)</script>"
PROMPTS = [
    dict(slug="river", prompt="How many rivers?", solution="There are 3 rivers. Then 4 more come. So 7.", answer=" 7"),
    dict(slug="bad", prompt=f"See {BAD} here. 我有三个苹果。还剩几个？"),
]


@pytest.fixture(scope="module")
def tracked(inputs, tmp_path_factory):
    """A workdir in which two texts were followed through both layers, and the flags of its run."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    folder, flags = trained_stack.copy(
        inputs, tmp_path_factory, track__prompts=prompts, track__dictionaries=",".join(NAMES)
    )
    labels = folder / "atlas" / NAMES[1]
    labels.mkdir(parents=True)
    named = {str(feature): dict(label=f"all {BAD}", by="Ada", note="", f1=None) for feature in range(128)}
    write_json(labels / "labels.json", named)
    assert command.run(["track"], "", ["test", *flags]) == 0
    return folder, flags


def test_links_are_measured_as_the_library_does(tracked, inputs):
    """A feature is ablated at a position by the public edit; controls take away as much along other active features."""
    folder, _ = tracked
    lm = load_model(str(inputs[0]), dtype="float32")
    pair = [load_dictionary(folder / "train" / name) for name in NAMES]
    stack = [
        SimpleNamespace(reads=each.site, name="", config=each.config, load=lambda each=each: each) for each in pair
    ]
    ids_T = np.arange(5, 17)
    firings = follow(lm, stack, ids_T)
    low, high = (int(each.at(9).feature_A[0]) for each in firings)
    (measured,), left_out = measure_chains(lm, stack, ids_T, 3, [((0, 9, low), (1, 9, high), 1.0)], firings, str, 0)
    (link,) = measured.links
    assert left_out == 0
    edits = [], [pair[0].ablate([low], (9, 10))], [pair[1].ablate([high], (9, 10))]
    outputs = [lm(pad([ids_T.tolist()]), capture=["resid_post.1"], edits=each) for each in edits]
    clean, edited = (float(pair[1].encode(run.sites["resid_post.1"])[0, 9, link.target]) for run in outputs[:2])
    assert link.lost == pytest.approx(1 - edited / clean, abs=1e-3)
    clean, without_low, without_high = (float(jax.nn.log_softmax(run.logits_BxTxV[0, -1])[3]) for run in outputs)
    assert link.answer_drop == pytest.approx(clean - without_high, abs=1e-4)
    assert measured.answer_drop == pytest.approx(clean - without_low, abs=1e-4)
    # Four features fire (k = 4): three controls, too few to decide.
    assert link.holds is link.reaches_answer is measured.holds is None
    assert _all([True, None]) is None and _all([None, False]) is False and _all([True, True]) is True


def test_texts_are_followed_and_kept(tracked, capsys):
    folder, flags = tracked
    unit = folder / "track" / "prompts"
    results = load_results(unit)
    river = results.texts["river"]
    assert list(results.texts) == ["river", "bad"] and river.sites == ("resid_post.0", "resid_post.1")
    assert [step.name for step in river.steps] == ["prompt", "step 1", "step 2", "step 3"]
    assert river.answer.strip() == "7" and len(river.lens.answer) == 2 and river.tested == "resid_post.1"
    assert all((step.test is None) == bool(step.untested) for step in river.steps[1:])
    rows = json.loads((unit / "river-cells.json").read_text())["cells"]
    assert len(rows) == 2 and {len(row) for row in rows} == {river.tokens}
    assert all(len(cell) <= 8 and cell[1::2] == sorted(cell[1::2], reverse=True) for row in rows for cell in row)
    text = (unit / "track.txt").read_text()
    told = sum(step.test is not None and step.test.hurt != "not testable" for step in river.steps)
    # Those that could not be tested are no evidence.
    assert (f" of {told} tested steps" if told else "no step could be tested") in text
    assert summary(dataclasses.replace(river, steps=river.steps[:1])).endswith("; no step could be tested")
    assert "river:" in text and "  resid_post.1  " in text and "\033" not in text
    found = SimpleNamespace(select=lambda kind: {"prompts": results}, folders={"track/prompts": unit}, address=str)
    (section,) = sections(found, None)
    assert "river" in "\n".join(block.markdown() for block in section.blocks)
    assert "no other active" not in "\n".join(block.markdown() for block in section.blocks)
    without = TrackResults(dict(river=dataclasses.replace(river, chains=(), chains_left_out=2)))
    found = SimpleNamespace(select=lambda kind: {"prompts": without}, folders={"track/prompts": unit}, address=str)
    (section,) = sections(found, None)
    page = "\n".join(block.markdown() for block in section.blocks)
    assert "no other active feature to compare with: river (2)." in page
    assert command.run(["track"], "", ["test", *flags]) == 0
    assert "done before, unchanged" in capsys.readouterr().out


def test_files_whose_names_differ_behind_a_dot_have_units_of_their_own():
    configs = [default_configs() | TrackConfig(prompts=f"texts/{name}", dictionaries=("topk",))
               for name in ("a.one.jsonl", "a.two.jsonl", "a.jsonl")]  # fmt: skip
    assert [all_stages()["track"].units(each) for each in configs] == [["track/a.one"], ["track/a.two"], ["track/a"]]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("dictionaries=", "--track.dictionaries is missing"),
        ("dictionaries=/nowhere/at/all", "/nowhere/at/all"),
        ("dictionaries=topk/resid_post.0-k4,topk/resid_post.0-k8", "are both of layer 0"),
        ("dictionaries=topk/resid_post.7", "resid_post.7"),
        ("prompt=both", "expected one of them"),
    ],
)
def test_what_is_refused_in_one_line(tracked, capsys, flag, message):
    _, flags = tracked
    assert command.run(["track"], "", ["test", *flags, f"--track.{flag}"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def follow_sentence(tracked, workdir, *more):
    """What is found of one sentence by dictionaries that are given by their folders."""
    folder, flags = tracked
    folders = ",".join(str(folder / "train" / name) for name in NAMES)
    flags = [*flags, "--track.prompts=", "--track.prompt=The river", f"--track.dictionaries={folders}", *more]
    assert command.run(["track"], "", ["test", *flags, f"--workdir={workdir}"]) == 0
    (found,) = load_results(workdir / "track" / "The-river").texts.values()
    return found


def test_the_output_of_the_model_is_followed_and_a_jacobian_lens_reads_where_it_is_named(tracked, inputs, tmp_path):
    lm = load_model(str(inputs[0]), dtype="float32")
    (written,) = lm.generate(lm.tokenize(["The river"]), 6)
    plain = follow_sentence(tracked, tmp_path / "one", "--track.generate=6")
    assert plain.output == written.text.strip() and plain.steps[0].name == "prompt"
    assert "".join(step.text for step in plain.steps[1:]).replace(" ", "") == plain.output.replace(" ", "")
    assert "  output           " in (tmp_path / "one" / "track" / "The-river" / "track.txt").read_text()
    turned_DxD = np.linalg.qr(np.random.default_rng(0).standard_normal([lm.config.d_model] * 2))[0].astype(np.float32)
    JacobianLens(lm, {0: turned_DxD}, 1).save(tmp_path / "lens.pt")
    lens = f"--model.lens={tmp_path / 'lens.pt'}"
    carried = follow_sentence(tracked, tmp_path / "two", "--track.generate=6", lens)
    assert plain.lens.answer[0] != carried.lens.answer[0] and plain.lens.answer[1] == carried.lens.answer[1]
    pages = [(tmp_path / name / "track/The-river/index.html").read_text() for name in ("one", "two")]
    assert "`Logit lens; dashed" not in pages[0]  # its name is the lens's
    assert ["Jacobian lens" in page for page in pages] == [False, True]


def write_page_with_a_chain(unit, page):
    """Write the page of a unit again, its first text with a measured chain: untrained features have no links."""
    results = load_results(unit)
    cells = {slug: json.loads((unit / f"{slug}-cells.json").read_text()) for slug in results.texts}
    (low, *_), (high, *_) = (next(cell for cell in row if cell) for row in cells["river"]["cells"])
    link = MeasuredLink(
        lower="resid_post.0", source=low, upper="resid_post.1", target=high, position=1, token="How",
        lost=0.75, random_lost=0.12, answer_drop=0.3, random_drop=0.01, holds=True, reaches_answer=True,
    )  # fmt: skip
    chain = MeasuredChain((link,), answer_drop=0.2, random_drop=0.3, reaches_answer=False, holds=False)
    river = dataclasses.replace(results.texts["river"], chains=(chain,), chains_left_out=1)
    texts = dict(results.texts) | dict(river=river)
    write_page(page, dataclasses.replace(results, texts=texts), cells, "tiny")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(400, False), (1300, True)])
def test_the_page(tracked, tmp_path, width, dark):
    page = tmp_path / "index.html"
    write_page_with_a_chain(tracked[0] / "track" / "prompts", page)
    with chromium(tmp_path / "profile") as browser:
        browser.view(width, 900, dark=dark, phone=width == 400)
        browser.open(page.as_uri())
        browser.wait("document.body.dataset.ready === 'true'")
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        shown = browser.js("document.body.innerText")
        assert BAD in shown and "我有三个苹果" in shown and "similarity of their directions" in shown
        assert "Chains of features, measured" in shown and "loses 75 %, 12 % with random features (holds)" in shown
        assert "The chain does not hold." in shown and "Left out: 1 of the strongest chains" in shown
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


# Statement 3 of WORKSPACE.md, what must hold.
def test_what_is_declared_is_read(tracked):
    """Otherwise a changed setting would make again what is the same."""
    assert settings_read.never_read("track") <= set()
