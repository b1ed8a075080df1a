"""Numbers with their nouns."""

import pytest

from saejax.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "item", "1 item"), (0, "item", "0 items"), (1200, "pair", "1,200 pairs"), (3, "dictionary", "3 dictionaries")],
)
def test_a_number_stands_before_its_noun_in_the_right_form(number, noun, text):
    assert counted(number, noun) == text
