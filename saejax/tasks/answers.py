r"""Final answers in what a model wrote, and whether they are right.

Numbers are found as lm-evaluation-harness does for gsm8k: *strict* takes the number after the first "#### ", *flexible*
the last number of the text, whatever stands around it, so that "The answer is \boxed{18}" holds the answer 18. Unlike
the harness it reads the signs of 1{,}250, 1\,250 and −5, the minus sign of Unicode. The strict rule compares text, as
the harness does, without thousands commas, dollar signs, a full stop at the end, and case. The flexible rule compares
values: "$29.00" is 29, as is "29" where the right answer is "29%".

Formulas are compared by the library math-verify, which knows that 1/2 and 0.5 are the same: *strict* takes the last
``\boxed{}``, *flexible* what math-verify finds in the whole text. math-verify drops subscripts, so numbers with a base
are compared before: 2516_9 is not 2516_8. It takes a pair for a set, which is told apart here: (2, 1) is neither
{1, 2} nor "1, 2". Inequalities are the intervals that they stand for, which it compares one way round alone. Times of
day are compared before, and what it does not read is written as it does: 10 000, 1 1/2, [2;5), 90°, x². A percentage
is also its number without the sign, as the data set writes both: 12.5% is 0.125 and 12.5.

The flexible rule judges; that the strict rule finds nothing is a failure of format, and is counted. An answer that
cannot be found is None, and counts as wrong.
"""

import dataclasses
import functools
import itertools
import re
import threading
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

_STRICT_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
# As loose as the harness's pattern: two or more digits, dollar signs, commas and points in a row count as a number, so
# a text that ends in "..." has the answer "...".
_ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = re.compile(r"[,$]")
# The thousands separators of LaTeX, and spaces that break no line; a minus sign that subtracts nothing.
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;:!]|\{,\}|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9])")
_MINUS = re.compile("(?<![0-9])\u2212(?=[$0-9.])")
_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, eleven=11, twelve=12)
_DIGITS, _BASE = r"([0-9][0-9A-F,]*)", rf"((?:[1-9][0-9]?|{'|'.join(_BASES)})(?![0-9]))"
# 2516_9, 2516_{9}, (2516)_9, 2516_{(9)}, \text{2516}_{\text{nine}}
_BASED = re.compile(
    rf"(?:\({_DIGITS}\)|\\text\{{{_DIGITS}\}}|(?<![0-9A-Za-z]){_DIGITS})_"
    rf"(?:\{{\s*(?:\\text\{{\s*{_BASE}\s*\}}|\({_BASE}\)|{_BASE})\s*\}}|\\text\{{\s*{_BASE}\s*\}}|{_BASE})"
)
_LAST_POINT = re.compile(r"(?<=[0-9])\.(?=\s*\})")  # \boxed{5.}
_BOX = re.compile(r"\\(?:boxed|fbox)(?=[\s{])\s*")
_PLAIN_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_OVER_ZERO = re.compile(r"/\s*0+(?![0-9.])|\}\s*\{\s*0+\s*\}")
# Spaces between thousands (10\,000); signs that math-verify does not know, and its own.
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;:! ]|\{,\}|~| )+[0-9]{3})+(?![0-9])")
_MIXED = re.compile(r"(?<![0-9./^_])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9./])")  # 1 1/2
_BRACKETED, _SEMICOLON = re.compile(r"[(\[][^()\[\]]*[)\]]"), re.compile(r"(?<!\\);")  # [2;5)
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")  # 0.1\overline{36}
_SAME_SIGN = {r"\varnothing": r"\emptyset", r"\degree": r"^\circ", "~": " "}
_SAME_SIGN |= {"\u00b0": r"^\circ", "\u221a": r"\sqrt ", "\u221e": r"\infty ", "\u00b7": r"\cdot ", "\u2212": "-"}
_RAISED, _ONE_SIGN = re.compile("[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+"), re.compile("[\u00bc-\u00be\u2150-\u215e]")
_ROOT, _PERCENT = re.compile("\u221a([0-9]+)"), re.compile(r"\s*\\?%")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\[,;:! ]|[\s$]")  # of brackets, and spaces
_OR = re.compile(r"\bor\b")
_TIME, _UNWRITTEN = re.compile("([0-9]{1,2}):([0-9]{2})([ap])m"), re.compile(r"\\(?:text|mathrm|[,;:! ])|[{}.~\s$]")
_SECONDS = 5  # for one formula; a tower of powers could take for ever


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer that one rule extracts from a generated text."""

    answer: str | None  #: the final answer as it is written there; None if the rule finds none
    correct: bool  #: whether it is right


def corrupted_answers(
    answer: str, choices: Sequence[str], count: int, seed: Sequence[int], is_formula: bool = False
) -> list[str]:
    """Return distinct wrong answers of the same form: other choices, or the answer with other digits.

    None of them is right by the flexible rule, as 2/4 is for 1/2, and no formula divides by zero.

    Args:
      answer: the right one.
      choices: answers to choose from; empty where none are given.
      count: number of wrong answers, at most.
      seed: seed of the draws.
      is_formula: the answer is judged as a formula, not as a number.

    Returns:
      Fewer than ``count`` where there are no more; none of an answer without choices and digits.
    """
    rng = np.random.default_rng(list(seed))
    if choices:
        others = [choice for choice in choices if choice != answer]
        return [others[place] for place in rng.permutation(len(others))[:count]]
    # The first digit of several stays above 0: "042" is no number of the form of "142", nor "0,142" of "1,142".
    wrong: dict[str, None] = {}
    for _ in range(20 * count if re.search("[0-9]", answer) else 0):
        text = re.sub("[0-9]+", lambda run: _draw_number(run, rng), answer)
        if text != answer and text not in wrong and _is_wrong(text, answer, is_formula):
            wrong[text] = None
        if len(wrong) == count:
            break
    return list(wrong)


def _is_wrong(text: str, answer: str, is_formula: bool) -> bool:
    """Return whether an answer with other digits is judged wrong, and has a value."""
    # Two numbers of one form have one value only if they are the same text; formulas take long to compare.
    if not is_formula or _PLAIN_NUMBER.fullmatch(answer):
        return True
    verdict = formula_verdicts(f"\\boxed{{{text}}}", answer)["flexible"]
    # math-verify writes every fraction with braces.
    return not verdict.correct and not _OVER_ZERO.search(verdict.answer or text)


def find_final_answer(solution: str, answer: str) -> int | None:
    r"""Return where a solution states its final answer; None where it does not hold the answer as it is.

    In the last box if the answer is there, else where it stands last without being part of a longer number.

    Args:
      solution: the worked solution, with or without ``\boxed{}``.
      answer: the final answer.
    """
    whole = re.compile(rf"(?<![0-9.\-])(?<![0-9],){re.escape(answer)}(?![.,]?[0-9])")
    box = _last_box(solution)
    for span in (box, (0, len(solution))) if box else ((0, len(solution)),):
        starts = [match.start() for match in whole.finditer(solution, *span)]
        if starts:
            return starts[-1]
    return None


def _draw_number(run: re.Match[str], rng: np.random.Generator) -> str:
    """Return a random number of as many digits as some in a text, at most 18 (of an int64)."""
    digits = min(len(run[0]), 18)
    is_longer = digits > 1 or run.string[run.end() : run.end() + 1] == ","
    return str(rng.integers(10 ** (digits - 1) if is_longer else 0, 10**digits))


def number_verdicts(text: str, answer: str) -> dict[str, Verdict]:
    """Return the verdicts by the strict and the flexible rule for numbers.

    Args:
      text: what the model wrote.
      answer: the right number, such as "1,250"; see ``number_value``.
    """
    first, numbers = _STRICT_NUMBER.search(text), _find_numbers(text)
    strict, flexible = first[1] if first else None, numbers[-1] if numbers else None
    return dict(
        # Text against text, as in the harness: figures are to be comparable with published ones.
        strict=Verdict(strict, strict is not None and _normal(strict) == _normal(answer)),
        flexible=Verdict(flexible, flexible is not None and _value(flexible) == number_value(answer) is not None),
    )


def number_value(answer: str) -> Decimal | None:
    """Return the value of an answer that holds one number, perhaps with a unit; None if it holds none, or several."""
    numbers = _find_numbers(answer)
    return _value(numbers[0]) if len(numbers) == 1 else None


def _find_numbers(text: str) -> list[str]:
    return _ANY_NUMBER.findall(_GROUPED.sub(_join_digits, _MINUS.sub("-", text)))


def _join_digits(number: re.Match[str]) -> str:
    return re.sub("[^0-9]", "", number[0])


def _normal(number: str) -> str:
    return _IGNORED.sub("", number).removesuffix(".").lower()


def _value(number: str) -> Decimal | None:
    """Return the value of a number; None for text that has none, such as "..."."""
    try:
        return Decimal(_normal(number).rstrip("."))
    except InvalidOperation:
        return None


def formula_verdicts(text: str, answer: str) -> dict[str, Verdict]:
    """Return the verdicts by the strict and the flexible rule for formulas.

    Args:
      text: what the model wrote.
      answer: the right formula in LaTeX, without a box around it.
    """
    boxed = last_boxed(text)
    times = [_TIME.fullmatch(_UNWRITTEN.sub("", some or "").lower()) for some in (answer, boxed)]
    if all(times):  # of day, of which math-verify makes a quotient
        verdict = Verdict(boxed, len({match.groups() for match in times if match}) == 1)
        return dict(strict=verdict, flexible=verdict)
    # Boxed again, so that math-verify reads the answer as it reads the model's.
    gold, anywhere = _parsed(f"\\boxed{{{answer}}}"), _parsed(text)
    in_box = _parsed(f"\\boxed{{{boxed}}}") if boxed else []
    readings = dict(
        strict=(boxed if in_box or boxed == answer else None, in_box),
        flexible=(str(anywhere[-1]) if anywhere else None, anywhere),
    )
    # Bases are looked for where the answer is, as numbers on the way may be of other bases.
    written = dict(strict=boxed, flexible=boxed or text)
    return {
        rule: Verdict(
            extracted,
            extracted is not None
            and (
                _plain(extracted) == _plain(answer)
                or (
                    _has_same_base(written[rule] or "", answer)
                    and _means_same(gold, answer, reading, boxed or extracted)
                )
            ),
        )
        for rule, (extracted, reading) in readings.items()
    }


def _means_same(gold: list[Any], answer: str, reading: list[Any], written: str) -> bool:
    """Return whether two formulas mean the same; each as math-verify reads it, and as it is written."""
    if not gold or not reading:
        return False
    import math_verify
    from sympy import FiniteSet

    is_same = functools.partial(math_verify.verify, timeout_seconds=_limit())
    (around_right, is_list), (around_answer, is_list_too) = _bracket(answer), _bracket(written)
    if is_list and is_list_too and around_right != around_answer:
        if "{" in (around_right, around_answer) and {"(", "["} & {around_right, around_answer}:
            return False
        if not around_right and around_answer == "(":  # a list without brackets in the order of a pair is a pair
            gold = _parsed(f"\\boxed{{({answer})}}")
    sets = [_numbers(gold[0], answer), _numbers(reading[0], written)]
    lists = [
        numbers is None and isinstance(of[0], FiniteSet) for numbers, of in zip(sets, (gold, reading), strict=True)
    ]
    if sets != [None, None] and any(lists):
        return False  # 2 < x < 5 is not 2, 5
    if None not in sets and gold[0].free_symbols != reading[0].free_symbols:
        return False
    if is_same(sets[0] or gold, sets[1] or reading):
        return True
    # math-verify takes 10 for 10%, and not 12.5 for 12.5%.
    without = [_PERCENT.sub("", text) for text in (answer, written)]
    return without != [answer, written] and is_same(*(_parsed(f"\\boxed{{{text}}}") for text in without))


def _plain(text: str) -> str:
    """Return a formula with single spaces, and words in it without what sets them upright."""
    return " ".join(_WORDS.sub(r"\1", text).split())


def _bracket(text: str) -> tuple[str, bool]:
    """Return the bracket around all of a formula, "" without one, and whether commas separate what is within."""
    text = _SIZE.sub("", text).replace(r"\{", "{").replace(r"\}", "}")
    depths = list(itertools.accumulate((char in "{([") - (char in "})]") for char in text))
    around = text[:1] if text[:1] in ("{", "(", "[") and 0 not in depths[:-1] else ""
    return around, any(char in ",;" and depth == bool(around) for char, depth in zip(text, depths, strict=True))


def _numbers(formula: Any, written: str) -> Any:
    """Return the set of the numbers that inequalities stand for; None where a formula is none of one variable."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
    from sympy import And, FiniteSet, GreaterThan, LessThan, StrictGreaterThan, StrictLessThan, Union

    # math-verify makes a list of "x < 2 or x > 3".
    parts = list(formula.args) if isinstance(formula, FiniteSet) and _OR.search(written) else [formula]
    simple = [relation for part in parts for relation in (part.args if isinstance(part, And) else [part])]
    kinds = (GreaterThan, LessThan, StrictGreaterThan, StrictLessThan)
    if not all(isinstance(relation, kinds) for relation in simple) or len(formula.free_symbols) != 1:
        return None
    try:
        return timeout(timeout_seconds=_limit())(lambda: Union(*(part.as_set() for part in parts)))()
    except (Exception, TimeoutException):  # sympy raises many kinds for what it cannot solve
        return None


def _has_same_base(written: str, answer: str) -> bool:
    """Return whether the last number with a base in a text has the base of the answer; True where either has none."""
    bases = [[_base(match) for match in _BASED.finditer(text)] for text in (written, answer)]
    return not all(bases) or bases[0][-1] == bases[1][-1]


def _base(match: re.Match[str]) -> int:
    text = next(group for group in match.groups()[3:] if group)
    return _BASES.get(text) or int(text)


def _tidy_number(match: re.Match[str]) -> str:
    digits = next(group for group in match.groups()[:3] if group)
    return f"{digits}_{{{_base(match)}}}"


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    above = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return f"\\frac{{{above}}}{{{10 ** len(fixed) * (10 ** len(repeated) - 1)}}}"


def _parts(sign: str) -> list[str]:
    return unicodedata.normalize("NFKC", sign).split("\u2044")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{}`` or ``\fbox{}``; None if there is none or it is empty.

    The content of ``\boxed 5$``, without braces, is the text before the dollar sign.
    """
    box = _last_box(text)
    return text[slice(*box)].strip() or None if box else None


def _last_box(text: str) -> tuple[int, int] | None:
    """Return where the content of the last closed box starts and stops."""
    # From the back, as models box steps before the answer; a box that is not closed was cut off.
    for box in reversed(list(_BOX.finditer(text))):
        if text[box.end() : box.end() + 1] != "{":
            return box.end(), box.end() + len(text[box.end() :].split("$")[0])
        depth = 0
        for end in range(box.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return box.end() + 1, end
    return None


def _parsed(text: str) -> list[Any]:
    """Parse a text with math-verify; return its formula and the formula's text, or nothing if there is none."""
    # math-verify knows one way to write a base, and no full stop at the end of a number.
    text = _LAST_POINT.sub("", _BASED.sub(_tidy_number, text))
    text = _THOUSANDS.sub(_join_digits, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _BRACKETED.sub(lambda part: _SEMICOLON.sub(",", part[0]), text)
    text = _REPEATING.sub(_as_fraction, text)
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _RAISED.sub(lambda digits: f"^{{{unicodedata.normalize('NFKC', digits[0])}}}", text)
    text = _ONE_SIGN.sub(lambda sign: r"\frac{{{}}}{{{}}}".format(*_parts(sign[0])), text)
    for sign, own_sign in _SAME_SIGN.items():
        text = text.replace(sign, own_sign)
    # Here, because math-verify loads sympy, which benchmarks of numbers do not need.
    import math_verify
    from math_verify.errors import TimeoutException

    try:
        return math_verify.parse(text, parsing_timeout=_limit())
    except TimeoutException:  # not an ``Exception``, so that math-verify does not catch it itself
        return []


def _limit() -> int | None:
    """Return the time limit that math-verify can keep: it uses an alarm, which only the main thread may set."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
