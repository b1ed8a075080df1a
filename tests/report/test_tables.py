"""Numbers and tables as text, Markdown and HTML."""

import math

import pytest
from report_page import Page

from saejax.page.document import Section, to_html
from saejax.page.tables import Table, escape_markdown, interval, number, percent, significant, visible
from saejax.results import Interval


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(-0.5, 2, "−0.50"), (1234.5, 1, "1,234.5"), (-0.001, 2, "0.00"), (None, 2, "–"), (math.nan, 2, "–"), (3, 0, "3")],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "0.00123"), (12345.6, "12,346"), (-9.87654, "−9.88"), (0.0, "0"), (3e-9, "3.00e−09"), (None, "–")],
)
def test_significant(value, text):
    assert significant(value) == text


def test_interval_percent_and_text_on_a_line():
    assert interval(Interval(-0.055, -0.1, 0), 1, 100) == "−5.5 [−10.0,\u00a00.0]"
    assert percent(0.875, 1) == "87.5\u00a0%" and percent(None) == "–"
    assert visible("a\r\nb\n\tc\x00") == "a↵b↵⇥c·"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<b> & |", "\\<b\\> &amp; \\|"),
        ("_a_ b_c", "\\_a\\_ b_c"),
        ("1. x", "1\\. x"),
        ("1.5 x", "1.5 x"),
        ("# x", "\\# x"),
        ("- x", "\\- x"),
        ("a - x\ny", "a - x↵y"),
        ("`*[$~", "\\`\\*\\[\\$\\~"),
    ],
)
def test_escape_markdown(text, escaped):
    assert escape_markdown(text) == escaped


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


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        Table("t", ("a", "b"), (("only",),))
