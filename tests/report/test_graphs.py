"""The report's section on attribution graphs: what it says, shows and links, and what it does where something lacks."""

import math
import re
import types
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from made_up_workspace import make_run, make_workspace, write_summary
from test_report import Page, both

from saejax.attribution import report as graphs
from saejax.attribution.report_kept import kept_blocks
from saejax.attribution.results import AttributeResults
from saejax.errors import UserError
from saejax.page import style
from saejax.page.blocks import Links, Picture
from saejax.page.findings import Findings
from saejax.report import run as report
from saejax.report.run import run_report
from saejax.results import from_json

SHARE = [0.1, 0.5, 1.0]
SVG = (
    '<?xml version="1.0"?>\n<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="200.4pt" height="90pt" '
    'viewBox="0 0 200.4 90" xmlns="http://www.w3.org/2000/svg"><g id="a"><path clip-path="url(#b)" '
    'style="fill: #f5f7f9; stroke: #1b1f24"/><path style="fill: #ffffff; stroke: #555e68"/></g></svg>'
)


def curve(**changes) -> dict:
    """What the stage says of parts of a graph."""
    same = dict.fromkeys(("readout", "complement"), [0.0] * 3) | dict.fromkeys(("features", "errors"), [1] * 3)
    return dict(share=SHARE, **same, model=3.0, empty=1.0, rest="zero") | changes


def result(**changes) -> dict:
    """What the stage says of a graph."""
    return (
        dict(
            prompt="The capital of\nFrance <b>is",
            tokens=["The"],
            targets=[dict(label=" Paris", logit=9.0, weight=0.62), dict(label=" Rome", logit=5.0, weight=0.034)],
            active=12_345,
            traced=4_096,
            features=52,
            errors=9,
            edges=1_977,
            scores=dict(replacement=0.654, completeness=0.879),
            unexplained=1e-7,
            seconds=7.3,
            doubling=dict(features=32, held_error=2.2e-7, free=dict(pearson=0.751, spearman=0.6, sign=0.7)),
            circuits=curve(faithfulness=[0.0, 0.75, 1.0], incompleteness=[1.0, 0.5, 0.25]),
            supernodes=0,
            heads=None,
            query_key=[],
        )
        | changes
    )


def orders(**changes) -> dict:
    """What the stage says of circuits of equal numbers of features."""
    part = dict(effect=dict(mean=0.91, low=0.8, high=1.0), influence=dict(mean=0.71, low=0.6, high=0.8))
    part |= dict(difference=dict(mean=0.2, low=0.125, high=0.25), random=dict(mean=0.3, low=0.25, high=0.35))
    share, lines = [0.02, 0.2, 1.0], {order: [0.5, 0.875, 1.0] for order in ("effect", "size", "random")}
    known = dict(prompts=8, share=share, features=[2, 20, 100], model=3.0, empty=1.0, reason=None)
    return known | dict(faithfulness=lines | dict(influence=[0.25, 0.75, 1.0]), scores=dict(cpr=part)) | changes


def test_orders_of_features_are_a_table_with_intervals(tmp_path):
    none = orders(reason="one prompt has no interval", faithfulness={}, scores={})
    slugs = dict(agreement=result(kept=orders()), capital=result(kept=none), other=result())
    inputs = add_units(tmp_path, {}, dict(behaviours=slugs))
    found = [from_json(AttributeResults, dict(transcoders="t", dictionaries=[], graphs=slugs), tmp_path).graphs]
    made = [
        graphs.ReportedGraph(n, tmp_path, slug, "t", False, one) for n, (slug, one) in enumerate(found[0].items(), 1)
    ]
    table, why = kept_blocks(made)
    assert table.rows == (
        ("Graph 1: agreement", "8", "CPR", "0.910 [0.800,\u00a01.000]", "0.710 [0.600,\u00a00.800]",
         "0.200 [0.125,\u00a00.250]", "0.300 [0.250,\u00a00.350]", "50\u00a0%", "25\u00a0%", "88\u00a0%", "75\u00a0%"),
    )  # fmt: skip
    assert why.items == (("Graph 2: capital", "orders are not compared: one prompt has no interval."),)
    assert kept_blocks(made[2:]) == [] and inputs


def add_units(root: Path, inputs: dict, units: dict[str, dict[str, dict]]) -> dict:
    """The inputs with units of graphs: unit -> slug -> result."""
    for unit, by_slug in units.items():
        folder = root / "inputs" / "attribute" / unit
        folder.mkdir(parents=True)
        results = dict(transcoders=f"/far/away/sets/{unit}", dictionaries=[], graphs=by_slug)
        write_summary(folder, "attribute", unit, results, config=dict(graph=dict(slug=unit)))
        for slug in by_slug:
            (folder / f"{slug}.svg").write_text(SVG)
            (folder / f"{slug}.html").write_text("page")
        inputs[f"attribute/{unit}"] = folder
    return inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report on a workspace with graphs of two sets of transcoders: its folder, its results, its page."""
    undefined = curve(faithfulness=[None] * 3, incompleteness=[None] * 3, model=1.0)
    units = dict(
        paris=dict(paris=result()),
        wide=dict(paris=result(scores=dict(replacement=0.9, completeness=0.95)), flat=result(circuits=undefined)),
    )
    units["wide"]["bare"] = result(doubling=None, circuits=None)
    root = tmp_path_factory.mktemp("report")
    run = make_run(root, add_units(root, make_workspace(root, kinds=("topk",), top=3, sets=5), units))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "contexts", lambda run, name, features, count: {})
        results = run_report(run)
    return run.folder, results, Page((run.folder / "index.html").read_text(encoding="utf-8"))


def test_page_and_markdown_say_what_was_found(made):
    for text in both(made):
        assert "4 prompts were traced into attribution graphs" in text
        assert re.search(r"it 65\s% to 90\s% comes from the prompt's tokens through features", text)
        assert "has a correlation of 0.75 with what happens when features are doubled" in text
        assert "Graphs with the transcoders sets/paris" in text and "Graphs with the transcoders sets/wide" in text
        for cell in ("12,345", "4,096", "1,977", "0.65", "0.88", "2.2e−7", "0.75"):
            assert cell in text.replace("e−07", "e−7"), cell
        assert "Prompt: “The capital of↵France <b>is”. Explained: Paris (62 %), Rome (3.4 %)." in text.replace(
            "\xa0", " "
        )
        assert "1 if features explain all, 0 if errors do" in text and "how well the picture" in text
        assert "No curves of Graph 3: flat: the answer is the same without any feature and error." in text
    rows = [line for line in (made[0] / "report.md").read_text().splitlines() if line.startswith("| 4: bare")]
    assert [row.count("–") for row in rows] == [2]


def test_figures_of_graphs_take_the_pages_colours_and_stay_as_files(made):
    folder, results, page = made
    names = [name for name in results.figures if name.startswith("graph_")]
    assert names == ["graph_curves", "graph_1_paris", "graph_2_paris", "graph_3_flat", "graph_4_bare"]
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) and {"graph_1_paris-a", "graph_2_paris-a"} <= set(ids)
    styles = " ".join(page.attributes("style"))
    assert "fill: var(--card); stroke: currentColor" in styles and "fill: var(--paper); stroke: var(--soft)" in styles
    assert styles.count("--width: 261pt") == 4
    for name in names[1:]:
        assert (folder / "figures" / f"{name}.svg").read_text() == SVG
        assert f"](figures/{name}.svg)" in (folder / "report.md").read_text()


def test_links_lead_to_the_pages(made):
    folder, _, page = made
    links = [link for link in page.attributes("href") if not link.startswith(("#", "data:"))]
    pages = [f"../inputs/attribute/{page}.html" for page in ("paris/paris", "wide/paris", "wide/flat", "wide/bare")]
    assert links == pages and all((folder / unquote(link)).is_file() for link in links)
    assert all(f"]({link})" in (folder / "report.md").read_text() for link in pages)


def findings(report: Path, folders: dict[str, Path], **units) -> Findings:
    """What sections read of units of graphs."""
    summaries = {
        f"attribute/{name}": types.SimpleNamespace(results=from_json(AttributeResults, results, name))
        for name, results in units.items()
    }
    return Findings(summaries, folders, report, {})


def section_of(count: int, tmp_path: Path, **changes):
    """The section on so many graphs, the figures that were drawn, and the sections of graphs."""
    folder, drawn = tmp_path / "unit", {}
    folder.mkdir()
    (tmp_path / "figures").mkdir()
    by_slug = {f"g{number}": result(**changes) for number in range(count)}
    for slug in by_slug:
        (folder / f"{slug}.svg").write_text(SVG)
    found = findings(tmp_path, {"attribute/u": folder}, u=dict(transcoders="set", dictionaries=[], graphs=by_slug))

    def draw(name, figure, caption, alt):
        drawn[name] = figure, caption, alt
        return Picture(name, "", caption, alt)

    return *graphs.sections(found, draw), drawn


def test_curves_show_what_was_measured_and_leave_gaps(tmp_path):
    gaps = curve(faithfulness=[-7.0, math.nan, 0.9], incompleteness=[1.0, None, 0.2])
    *_, drawn = section_of(1, tmp_path, circuits=gaps)
    figure, caption, alt = drawn["graph_curves"]
    above, below = (axes.lines[0] for axes in figure.axes)
    np.testing.assert_array_equal(above.get_xdata(), [10, 50, 100])
    np.testing.assert_array_equal(above.get_ydata(), [-0.5, np.nan, 0.9])  # cut off at the panel's edge
    np.testing.assert_array_equal(below.get_ydata(), [1.0, np.nan, 0.2])
    assert "Values beyond the panels" in caption and "Graph 1: g0: alone –, all others – at 50" in alt


def test_of_many_graphs_all_have_a_row_and_the_first_ones_a_figure(tmp_path):
    section, *each, drawn = section_of(len(style.LINES) + 2, tmp_path)
    assert len(section.blocks[1].rows) == len(style.LINES) + 2 and len(each) == graphs.SHOWN
    assert [len(block.items) for block in section.blocks if isinstance(block, Links)] == [
        len(style.LINES) + 2 - graphs.SHOWN
    ]
    figure, caption, _ = drawn["graph_curves"]
    median = figure.axes[0].lines[len(style.LINES) + 2]
    np.testing.assert_array_equal(median.get_ydata(), [0.0, 0.75, 1.0])
    assert median.get_color() == style.BLUE and "blue: their median" in caption
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a graph", "median of the graphs"]


def test_without_graphs_there_is_nothing(tmp_path):
    assert graphs.sections(findings(tmp_path, {}), None) == []


def test_a_missing_figure_is_named(tmp_path):
    inputs = add_units(tmp_path, {}, dict(paris=dict(paris=result())))
    (inputs["attribute/paris"] / "paris.svg").unlink()
    found = findings(tmp_path, inputs, paris=dict(transcoders="set", dictionaries=[], graphs=dict(paris=result())))
    with pytest.raises(UserError, match=r"paris\.svg is missing or damaged: delete .* and run attribute again"):
        graphs.sections(found, lambda name, figure, caption, alt: Picture(name, "", caption, alt))


def test_graphs_of_saes_have_a_title_and_their_own_words(tmp_path):
    inputs = add_units(tmp_path, {}, dict(paris=dict(paris=result(circuits=None))))
    of = dict(transcoders="", dictionaries=["runs/a/train/topk", "runs/a/train/other"])
    found = findings(tmp_path, inputs, paris=dict(of, graphs=dict(paris=result(circuits=None))))
    (tmp_path / "figures").mkdir()
    first, _ = graphs.sections(found, lambda name, figure, caption, alt: Picture(name, "", caption, alt))
    text, table, terms = first.blocks[:3]
    assert table.caption == "Graphs with the SAEs train/topk, train/other"
    said = " ".join([first.lead, text.text, *(part for term in terms.items for part in term)])
    assert "the SAEs do not explain" in first.lead and "as gradients estimate it" in text.text
    assert "transcoder" not in said and "derivatives" in said
