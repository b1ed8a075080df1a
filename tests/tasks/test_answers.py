"""Final answers found in generated texts, and their comparison with the right ones."""

import re
import threading
import time

import pytest

from saejax.tasks.answers import corrupted_answers, find_final_answer, formula_verdicts, last_boxed, number_verdicts


def found(verdicts):
    """Under the strict rule and the flexible one: the answer, and whether it is right."""
    return [(verdicts[rule].answer, verdicts[rule].correct) for rule in ("strict", "flexible")]


NONE = (None, False)


@pytest.mark.parametrize(
    ("text", "answer", "strict", "flexible"),
    [
        ("3 + 4 = 7\n#### 7", "7", ("7", True), ("7", True)),
        ("#### -1,250.50 is it", "-1250.5", ("-1,250.50", False), ("-1,250.50", True)),
        ("#### 7\n\nso #### 8, or 9", "7", ("7", True), ("9", False)),
        ("#### 18.", "18", ("18.", True), ("18.", True)),  # the strict rule compares text as the harness does
        ("#### 1,8", "18", ("1,8", True), ("1,8", True)),
        ("#### 18.00", "18", ("18.00", False), ("18.00", True)),
        ("####7", "7", NONE, ("7", True)),
        ("#### $7", "7", NONE, ("$7", True)),
        ("#### seven 7", "7", NONE, ("7", True)),
        (r"The answer is \boxed{18}", "18", NONE, ("18", True)),
        ("They pay $1,300.", "1300", NONE, ("$1,300.", True)),
        ("from 3 to -5", "-5", NONE, ("-5", True)),
        ("12-5 is left", "5", NONE, ("-5", False)),
        ("so 1250", "1,250", NONE, ("1250", True)),
        ("so 1,250", "1250", NONE, ("1,250", True)),
        ("so $29.00", "29", NONE, ("$29.00", True)),
        ("so 29", "$29.00", NONE, ("29", True)),
        ("so 18..", "18", NONE, ("18..", True)),
        ("so 1.8", "18", NONE, ("1.8", False)),
        ("so 018", "18", NONE, ("018", True)),
        ("I wonder...", "18", NONE, ("...", False)),
        ("so 50%", "50%", NONE, ("50", True)),
        ("so 50", "50%", NONE, ("50", True)),
        ("so \u22125", "-5", NONE, ("-5", True)),
        ("so \u22125", "5", NONE, ("-5", False)),
        ("5\u22123 = 2", "2", NONE, ("2", True)),
        ("pages 3\u22125", "5", NONE, ("5", True)),
        (r"\boxed{1{,}250}", "1250", NONE, ("1250", True)),
        (r"so 1\,250\,000", "1250000", NONE, ("1250000", True)),
        ("so 1\u00a0250", r"1{,}250", NONE, ("1250", True)),
        ("in 2020\u00a0100", "100", NONE, ("100", True)),
        ("#### 5", "5 apples", ("5", False), ("5", True)),
        ("#### 2", "1/2", ("2", False), ("2", False)),
        ("I wonder...", "...", NONE, ("...", False)),
        ("no number", "0", NONE, NONE),
        ("", "0", NONE, NONE),
        ("½ of ٣", "0", NONE, NONE),
    ],
)
def test_numbers_are_found_and_compared(text, answer, strict, flexible):
    assert found(number_verdicts(text, answer)) == [strict, flexible]


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
        (r"Hence \boxed{(2516)_8}", "2516_8", True, True),
        (r"Hence \boxed{(2516)_{9}}", "2516_8", False, False),
        (r"Hence \boxed{2516_{(8)}}", "2516_8", True, True),
        (r"Hence \boxed{2516_{(9)}}", "2516_8", False, False),
        (r"Hence \boxed{\text{2516}_{\text{eight}}}", "2516_8", True, True),
        (r"Hence \boxed{2516_{\text{nine}}}", "2516_8", False, False),
        (r"Hence \boxed{BEE_{16}}", "BEE_{16}", True, True),
        (r"Hence \boxed{5.}", "5", True, True),
        (r"Hence \boxed{5.}", "5.1", False, False),
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


@pytest.mark.parametrize(
    ("answer", "same", "different"),
    [
        (
            "10000",
            [r"10\,000", r"10{,}000", r"10\ 000", r"\$10{,}000", "10,000", "10 000"],
            ["10, 000", "1000", "100 00"],
        ),
        ("1000000", ["1 000 000"], ["1 000", "1 0000 00"]),
        (r"1,\!000", [r"1\,000", "1000"], ["1.000"]),
        (
            "[2,5)",
            [r"x \in [2, 5)", r"2 \le x < 5", r"5 > x \geq 2", r"\left[2,5\right)", "[2;5)", r"\left[2;\,5\right)"],
            [r"2\le x\le 5", "(2,5]", "2,5", "(2;5]", "[2;5]"],
        ),
        (r"2\le x<5", ["[2,5)", r"5 > x \ge 2"], ["(2,5)", "2<x<5", r"2 \le y < 5", "2,5", r"\{2,5\}"]),
        ("2<x<5", ["(2,5)"], ["2,5", r"\{2,5\}", "x<5"]),
        (r"x \le 5", [r"(-\infty,5]", r"5 \ge x"], [r"(-\infty,5)", "x<5", "5"]),
        (
            r"(-\infty,2)\cup(3,\infty)",
            [r"x<2 \text{ or } x>3", r"\left(3,+\infty\right) \cup (-\infty, 2)"],
            [r"x<2 \text{ and } x>3", r"(-\infty,2]\cup(3,\infty)", "(2,3)"],
        ),
        (r"\{1,2\}", ["2,1", r"\{2,1\}"], ["(1,2)", "(2,1)", "[1,2]"]),
        ("1,2", ["2,1", r"\{2,1\}", r"1 \text{ and } 2"], ["(2,1)", "[1,2]", "12", "1.2"]),
        ("(1,2)", [r"\left(1,2\right)", "(x,y)=(1,2)", "(1;2)"], ["(2,1)", r"\{1,2\}", "2,1", "[1,2]", "(2;1)"]),
        (r"\frac12", [r"\frac{1}{2}", r"\dfrac12", ".5", "0.5", r"50\%"], ["2", "12"]),
        (
            r"\frac{3}{22}",
            [r"0.1\overline{36}", r".1\overline{36}"],
            ["0.136", r"0.\overline{136}", r"-0.1\overline{36}"],
        ),
        (r"-2.\overline{3}", [r"-\frac73", r"-2.3\overline{3}"], ["-2.3", r"\frac73"]),
        (r"1\frac12", [r"\frac{3}{2}", "1.5", "1 1/2"], [r"\frac{11}{2}", r"\frac12", "11/2", "1 1/3"]),
        ("1 1/2", [r"\frac{3}{2}", "1.5", r"1\frac12"], ["11/2", "1/2"]),
        (
            r"8:00\text{ a.m.}",
            ["8:00 a.m.", r"8\!:\!00 \text{ AM}", r"\text{8:00 am}", "8:00"],
            ["8:00 p.m.", "9:00 a.m.", "8:30 a.m.", "8"],
        ),
        (r"50\%", ["50", "50%", r"\frac12"], ["5", "5000"]),
        (r"12.5\%", ["12.5", "12.5%", "0.125"], ["1.25", "125", "2.5"]),
        ("12.5", [r"12.5\%", "12.50"], [r"1.25\%"]),
        (r"33\frac13\%", [r"33\frac{1}{3}"], ["33", r"3\frac13"]),
        (r"90^\circ", ["90", r"90\degree", r"90^{\circ}", "90\u00b0"], [r"\frac{\pi}{2}"]),
        (r"x^{12}", ["x\u00b9\u00b2"], ["x\u00b2", "x12"]),
        (r"\frac{3}{2}", ["1\u00bd", "1.5"], ["\u00bd", "1\u2154"]),
        (r"2\sqrt{3}", ["\u221a12", "2\u221a3", "2\u00b7\u221a3"], ["\u221a3", "\u221a1 2"]),
        (r"(-\infty,2)", ["(\u2212\u221e,2)", "x < 2"], ["(\u221e,2)"]),
        (r"\text{June 20}", ["June 20", r"\mathrm{June}\text{ 20}"], ["June 21", "20"]),
        (r"5\text{ cm}", ["5", r"5~\text{cm}", r"5\,\mathrm{cm}"], [r"6\text{ cm}"]),
        (r"\emptyset", [r"\varnothing"], ["0"]),
    ],
)
def test_answers_that_are_written_otherwise(answer, same, different):
    for written in (*same, *different):
        right = [verdict.correct for verdict in formula_verdicts(rf"Hence $\boxed{{{written}}}$.", answer).values()]
        assert right == 2 * [written in same], written


def test_a_formula_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("saejax.tasks.answers._SECONDS", 1)
    start = time.process_time()  # a busy machine takes longer, but no more of this
    assert not formula_verdicts(r"\boxed{(10^{10})!}", "7")["strict"].correct
    assert time.process_time() - start < 30


def test_formulas_in_a_thread_are_as_they_were_written():
    verdicts = []
    text = r"first $x = 3$, then \boxed{\frac{6}{8}}"
    thread = threading.Thread(target=lambda: verdicts.append(formula_verdicts(text, r"\frac{3}{4}")))
    thread.start()
    thread.join()
    assert found(verdicts[0]) == [(r"\frac{6}{8}", True)] * 2


def test_corrupted_answers_have_the_form_of_the_right_one():
    for answer, form in (
        ("7", r"\d"),
        ("-42", r"-[1-9]\d"),
        ("1,250.5", r"[1-9],[1-9]\d\d\.\d"),
        ("x^2 + 13", r"x\^\d \+ [1-9]\d"),
    ):
        others = corrupted_answers(answer, (), 8, [0])
        assert len({*others, answer}) == 9 and all(re.fullmatch(form, other) for other in others)
        assert others == corrupted_answers(answer, (), 8, [0]) != corrupted_answers(answer, (), 8, [1])
    assert corrupted_answers("odd", (), 8, [0]) == [] and len(corrupted_answers("7", (), 20, [0])) == 9
    assert sorted(corrupted_answers("(B)", ("(A)", "(B)", "(C)"), 8, [0])) == ["(A)", "(C)"]


def test_corrupted_answers_are_wrong_and_have_a_value():
    for answer, count in ((r"\frac{1}{2}", 60), ("3/6", 60), ("(1, 2)", 9)):
        others = corrupted_answers(answer, (), count, [0], is_formula=True)
        assert len(others) == count
        assert not any(formula_verdicts(rf"\boxed{{{other}}}", answer)["flexible"].correct for other in others)
        values = [list(map(int, re.findall("[0-9]", other))) for other in others]
        assert answer == "(1, 2)" or all(low and 2 * high != low for high, low in values)


def test_final_answers_are_found_where_they_are_stated():
    for solution, answer, start in (
        (r"There are \boxed{5} of the 15 ways.", "5", r"5} of"),
        (r"\boxed{5}, that is 5 of all.", "5", "5}"),
        (r"With \boxed{3} and 5: \boxed{x = 5}, of 25.", "5", "5}, of"),
        ("5 of 1.5, 15, 5.5, 1,500 and 5,000", "5", "5 of"),
        ("The sum is 5.", "5", "5."),
        ("1+1=2\n#### -5", "-5", "-5"),
        ("15 and 5.2", "5", None),
        (r"\boxed{\frac{1}{2}}", "0.5", None),
        ("(B)", "(B)", "(B)"),
    ):
        assert find_final_answer(solution, answer) == (None if start is None else solution.index(start))
