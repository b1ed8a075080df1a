"""Final answers found in generated texts, and their comparison with the right ones."""

import threading
import time

import pytest

from saejax.tasks.answers import flexible_number, formula_verdicts, last_boxed, number_verdicts, strict_number


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("3 + 4 = 7\n#### 7", "7", "7"),
        ("#### -1,250.50 is it", "-1,250.50", "-1,250.50"),
        ("#### 7\n\nso #### 8, or 9", "7", "9"),
        ("####7", None, "7"),
        ("#### $7", None, "$7"),
        ("They pay $1,300.", None, "$1,300."),
        ("from 3 to -5", None, "-5"),
        ("12-5 is left", None, "-5"),
        ("I wonder...", None, "..."),
        ("no number", None, None),
        ("", None, None),
        ("#### seven 7", None, "7"),
        ("½ of ٣", None, None),
    ],
)
def test_numbers_are_found(text, strict, flexible):
    assert strict_number(text) == strict and flexible_number(text) == flexible


@pytest.mark.parametrize(
    "found, answer, same",
    [
        ("18", "18", True),
        ("18.", "18", True),
        ("1,250", "1250", True),
        ("1250", "1,250", True),
        ("$18", "18", True),
        ("-5", "-5", True),
        ("5", "-5", False),
        ("18.00", "18", True),
        ("$29.00", "29", True),
        ("29", "$29.00", True),
        ("18..", "18", True),
        ("1.8", "18", False),
        ("018", "18", True),
        ("...", "18", False),
        ("...", "...", True),
    ],
)
def test_the_flexible_rule_compares_values(found, answer, same):
    verdict = number_verdicts(f"so {found}", answer)["flexible"]
    assert verdict.answer == found and verdict.correct == same


@pytest.mark.parametrize(("found", "same"), [("18", True), ("18.", True), ("1,8", True), ("18.00", False)])
def test_the_strict_rule_compares_text_as_the_harness_does(found, same):
    assert number_verdicts(f"#### {found}", "18")["strict"].correct == same


@pytest.mark.parametrize(
    ("text", "answer", "strict", "flexible"),
    [
        (r"The answer is \boxed{18}", "18", (None, False), ("18", True)),
        ("I cannot say", "0", (None, False), (None, False)),
        ("#### 7\nQ: next? 8", "7", ("7", True), ("8", False)),
    ],
)
def test_the_two_rules_may_differ(text, answer, strict, flexible):
    verdicts = number_verdicts(text, answer)
    found = [(verdicts[rule].answer, verdicts[rule].correct) for rule in ("strict", "flexible")]
    assert found == [strict, flexible]


@pytest.mark.parametrize(
    "text, held",
    [
        (r"so $\boxed{7}$", "7"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\fbox{3} is framed", "3"),
        (r"\boxed {4}", "4"),
        (r"gives $\boxed 5$ then", "5"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{ }", None),
        (r"\boxedness{3}", None),
        (r"\boxed", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_last_box_is_found(text, held):
    assert last_boxed(text) == held


@pytest.mark.parametrize(
    "text, answer, strict, flexible",
    [
        (r"Hence $\boxed{\frac{3}{4}}$.", r"\frac{3}{4}", True, True),
        (r"Hence \boxed{0.75}.", r"\frac{3}{4}", True, True),
        (r"Hence \boxed{\tfrac34}", r"\frac{3}{4}", True, True),
        (r"Hence \boxed{2x + x}", "3x", True, True),
        (r"Hence \boxed{[2,5)}", "[2,5)", True, True),
        (r"Hence \boxed{[2,5]}", "[2,5)", False, False),
        (r"Hence \boxed{2, 1}", "1,2", True, True),
        (r"Hence \boxed{\text{Tuesday}}", r"\text{Tuesday}", True, True),
        (r"Hence \boxed{1}, or rather \boxed{2}", "2", True, False),  # math-verify joins neighbouring boxes to a set
        (r"The answer is $\frac{3}{4}$.", r"\frac{3}{4}", None, True),
        ("The answer is 3/4.", r"\frac{3}{4}", None, True),
        (r"The answer is $\frac{3}{5}$.", r"\frac{3}{4}", None, False),
        (r"Hence \boxed{7}", "8", False, False),
        (r"Hence \boxed{2516_8}", "2516_8", True, True),
        (r"Hence \boxed{2516_{8}}", "2516_8", True, True),
        (r"Hence \boxed{2516_9}", "2516_8", False, False),
        (r"Hence \boxed{2516_{9}}", "2516_8", False, False),
        (r"The answer is $2516_9$.", "2516_8", None, False),
        (r"The answer is $2516_8$.", "2516_8", None, True),
        (r"Hence \boxed{2517_8}", "2516_8", False, False),
        (r"Hence \boxed{2516}", "2516_8", True, True),  # the question names the base
        (r"Hence \boxed{x_1 + x_2}", "x_2 + x_1", True, True),
        (r"Hence \boxed{\$29.00}", "29", True, True),
        ("I do not know", "8", None, None),
        ("", "8", None, None),
    ],
)
def test_formulas_are_compared_by_what_they_mean(text, answer, strict, flexible):
    verdicts = formula_verdicts(text, answer)
    for rule, right in (("strict", strict), ("flexible", flexible)):
        assert verdicts[rule].correct == bool(right), rule
        assert (verdicts[rule].answer is None) == (right is None), rule


def test_the_found_formula_is_as_it_was_written():
    verdicts = formula_verdicts(r"first $x = 3$, then \boxed{\frac{6}{8}}", r"\frac{3}{4}")
    assert verdicts["strict"].answer == verdicts["flexible"].answer == r"\frac{6}{8}"


def test_a_formula_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("saejax.tasks.answers._SECONDS", 1)
    start = time.process_time()  # a busy machine takes longer, but no more of this
    assert not formula_verdicts(r"\boxed{(10^{10})!}", "7")["strict"].correct
    assert time.process_time() - start < 30


def test_formulas_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(formula_verdicts(r"\boxed{0.5}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert found[0]["strict"].correct
