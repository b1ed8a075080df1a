"""The report's section on attribution graphs: what it says, shows and links, and what it does where something lacks."""

import re
import types
from pathlib import Path
from urllib.parse import unquote

import pytest
from made_up_workspace import make_workspace, write_summary
from report_page import Report

from saejax.attribution.results import AttributeResults
from saejax.page.blocks import Links
from saejax.page.findings import Findings
from saejax.results import from_json
from saejax.stages.attribute import report as graphs


def result(**changes) -> dict:
    """What the stage says of a graph."""
    about = dict(prompt="The capital of\nFrance <b>is", tokens=["The"], active=12_345, traced=4_096, untraced=0.05)
    about |= dict(features=52, errors=9, edges=1_977, unexplained=1e-7, seconds=7.3)
    return (
        about
        | dict(
            targets=[dict(label=" Paris", logit=9.0, weight=0.62), dict(label=" Rome", logit=5.0, weight=0.034)],
            scores=dict(replacement=0.654, completeness=0.879),
            query_key=[],
        )
        | changes
    )


def add_units(root: Path, inputs: dict, units: dict[str, dict[str, dict]]) -> dict:
    """The inputs with units of graphs: unit -> slug -> result."""
    for unit, by_slug in units.items():
        folder = root / "inputs" / "attribute" / unit
        folder.mkdir(parents=True)
        results = dict(transcoders=f"/far/away/sets/{unit}", dictionaries=[], graphs=by_slug)
        write_summary(folder, "attribute", unit, results, config=dict(graph=dict(slug=unit)))
        for slug in by_slug:
            (folder / f"{slug}.html").write_text("page")
        inputs[f"attribute/{unit}"] = folder
    return inputs


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The report on a workspace with graphs of two sets of transcoders."""
    wide = dict(
        paris=result(scores=dict(replacement=0.9, completeness=0.95)),
        flat=result(empty="No feature is kept: x."),
        bare=result(),
    )
    units = dict(paris=dict(paris=result()), wide=wide)
    root = tmp_path_factory.mktemp("report")
    return Report(root, add_units(root, make_workspace(root, kinds=("topk",), top=3, sets=5), units))


def test_page_and_markdown_say_what_was_found(traced):
    for text in traced.texts:
        assert "4 prompts were traced into attribution graphs" in text
        assert "flat: No feature is kept: x." in text
        assert re.search(
            r"With \d+\s% of the active features traced, 65\s% to 90\s% of the influence on it comes", text
        )
        assert text.count("Graphs with the transcoders /far/away/sets/") == 2
        for cell in ("12,345", "4,096 (33", "5.0", "1,977", "0.65", "0.88"):
            assert cell in text, cell
        assert "Paris and 1 more" in text and "1: paris: The capital of↵France <b>is" in text
        assert "1 if features explain all, 0 if errors do" in text


def test_links_lead_to_the_pages(traced):
    links = [link for link in traced.page.attributes("href") if not link.startswith(("#", "data:"))]
    pages = [f"../inputs/attribute/{page}.html" for page in ("paris/paris", "wide/paris", "wide/flat", "wide/bare")]
    assert links == pages and all((traced.folder / unquote(link)).is_file() for link in links)
    assert all(f"]({link})" in traced.markdown for link in pages)


def sections_of(root: Path, **results) -> list:
    """The sections on units of graphs."""
    folders = add_units(root, {}, {unit: result["graphs"] for unit, result in results.items()})
    summaries = {
        f"attribute/{unit}": types.SimpleNamespace(results=from_json(AttributeResults, result, unit))
        for unit, result in results.items()
    }
    return graphs.sections(Findings(summaries, folders, root, {}), lambda *figure: pytest.fail("a figure is drawn"))


def unit_of(*slugs: str, **changes) -> dict:
    """The results of a unit of graphs."""
    return dict(transcoders="set", dictionaries=[], graphs={slug: result() for slug in slugs}) | changes


def test_all_graphs_have_a_row_and_a_link(tmp_path):
    assert sections_of(tmp_path) == []
    graphs = {f"g{number}": result(prompt=f"Start{' and' * 9000} end") for number in range(9)}
    (section,) = sections_of(tmp_path, u=unit_of(graphs=graphs))
    assert len(section.blocks[1].rows) == 9
    ((*_, (text, _)),) = [block.items for block in section.blocks if isinstance(block, Links)]
    assert text.startswith("9: g8: Start and") and text.endswith(" and end") and len(text) < 330  # not all of it


def test_prompts_and_answers_are_shown_as_tokens_on_pages(tmp_path):
    """Also what has no sign, such as a space of no width, and what is nothing but spaces."""
    targets = [dict(label=label, logit=9.0, weight=0.6) for label in (" a\u200bb", " c")]
    spaces = result(prompt="The\x00\u200b end\n", targets=[targets[0] | dict(label="  ")])
    (section,) = sections_of(tmp_path, u=unit_of(graphs=dict(g=result(targets=targets), h=spaces)))
    assert [row[1] for row in section.blocks[1].rows] == ["a\\u200bb and 1 more", "␣␣"]
    (links,) = [block.items for block in section.blocks if isinstance(block, Links)]
    assert links[1][0] == "2: h: The·\\u200b end↵"


def test_graphs_of_saes_have_a_title_and_their_own_words(tmp_path):
    saes = dict(transcoders="", dictionaries=["runs/a/train/topk", "runs/a/train/other"])
    (first,) = sections_of(tmp_path, u=unit_of(**saes, graphs=dict(paris=result())))
    text, table, terms = first.blocks[:3]
    assert table.caption == "Graphs with the SAEs runs/a/train/topk, runs/a/train/other"
    words = " ".join([first.lead, text.text, *(part for term in terms.items for part in term)])
    assert "the SAEs do not explain" in first.lead and "as gradients estimate it" in text.text
    assert "transcoder" not in words
