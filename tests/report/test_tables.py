"""Numbers and tables as text, Markdown and HTML."""

import math

import pytest
from report_page import Page

from saejax.page.blocks import Code
from saejax.page.document import Section, to_html
from saejax.page.strips import Example, Strips
from saejax.page.tables import Table, escape_markdown, interval, number, percent, significant
from saejax.page.words import place
from saejax.results import Interval
from saejax.unicode import visible


@pytest.mark.parametrize(
    ("show", "arguments", "text"),
    [
        (number, (-0.5, 2), "−0.50"),
        (number, (1234.5, 1), "1,234.5"),
        (number, (-0.001, 2), "0.00"),
        (number, (None, 2), "–"),
        (number, (math.nan, 2), "–"),
        (number, (3, 0), "3"),
        (significant, (0.00123456,), "0.00123"),
        (significant, (12345.6,), "12,346"),
        (significant, (-9.87654,), "−9.88"),
        (significant, (0.0,), "0"),
        (significant, (3e-9,), "3.00e−09"),
        (significant, (None,), "–"),
        (interval, (Interval(-0.055, -0.1, 0), 1, 100), "−5.5 [−10.0,\u00a00.0]"),
        (percent, (0.875, 1), "87.5\u00a0%"),
        (percent, (None,), "–"),
        (visible, ("a\r\nb\n\tc\x00",), "a↵b↵⇥c·"),
        (escape_markdown, ("<b> & |",), "\\<b\\> &amp; \\|"),
        (escape_markdown, ("_a_ b_c",), "\\_a\\_ b_c"),
        (escape_markdown, ("1. x",), "1\\. x"),
        (escape_markdown, ("1.5 x",), "1.5 x"),
        (escape_markdown, ("# x",), "\\# x"),
        (escape_markdown, ("- x",), "\\- x"),
        (escape_markdown, ("a - x\ny",), "a - x↵y"),
        (escape_markdown, ("`*[$~",), "\\`\\*\\[\\$\\~"),
        (place, ("attn_z.3, other:resid_pre.0",), "attn_z.3 and other:resid_pre.0"),
        (
            place,
            ("mlp_in.5+mlp_out.6",),
            "the input of the MLP in layer 5 (mlp_in.5) and the output of the MLP in layer 6 (mlp_out.6)",
        ),
    ],
)
def test_values_as_text(show, arguments, text):
    assert show(*arguments) == text


AWKWARD = Table("Cap & <tion>", ("Name", "Value"), (("a|b", "<1>"), ("new\nline", '"2"')), note="Not < this.")


def test_markdown_has_one_line_per_row_and_literal_cells():
    text = "**Cap &amp; \\<tion\\>**\n\n| Name | Value |\n| :-- | --: |\n"
    text += '| a\\|b | \\<1\\> |\n| new↵line | "2" |\n\nNot \\< this.'
    assert AWKWARD.markdown().strip() == text


def test_html_says_the_same():
    page = Page(to_html("", (), [Section("", (AWKWARD,))], "").partition("<main>")[2].partition("</main>")[0])
    assert [text for text in page.texts if text.strip()] == [
        "Cap & <tion>",
        "Name",
        "Value",
        "a|b",
        "<1>",
        "new↵line",
        '"2"',
        "Not < this.",
    ]
    assert page.attributes("data-label") == ["Value", "Value"]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("th") == 4 and tags.count("td") == 2


def test_contexts_without_any_activation_and_with_small_ones_are_shown():
    """As published files have them of features that never fire, and as models of small activations have them."""
    ((pieces, where),) = Strips("7", "", (Example(("a", "b"), (0.0, math.nan), 0, "in a file"),)).rows()
    assert [piece.share for piece in pieces] == [0, 0] and where == "activation 0, in a file"
    ((pieces, where),) = Strips("7", "", (Example(("a", "b"), (0.01234, 0.00456), 0, "in a file"),)).rows()
    assert [piece.label for piece in pieces] == ["0.0123", "0.00456"] and where == "activation 0.0123, in a file"


def test_what_is_copied_keeps_its_spaces_and_titles_in_other_letters_share_no_address():
    code = Code("Settings", "--report.title=Which 5 % of them?", folded=False)
    sections = [Section("One", (code,)), *(Section(f"Answers: {name}", (code,), 3) for name in ("首都", "反义词"))]
    page = Page(to_html("", (), sections, "").partition("<body>")[2].partition("</body>")[0])
    assert page.texts.count(code.text) == 3 and page.attributes("id") == ["one"]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        Table("t", ("a", "b"), (("only",),))
