"""Multiple choice of questions whose answers are numbers: the wrong ones are right answers to other questions.

Questions are put into groups of four (of five where they do not divide) whose answers are different numbers of like
size, and these answers are the choices of every question of the group. So each choice is right as often as every other
one, and a model that does not read the question is right by chance, whatever numbers it prefers: it answers all
questions of a group alike, and one of them rightly.
"""

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from saejax.errors import UserError

COUNT = 4  # choices of a question


def number_choices(answers: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the choices of each question, from the smallest number to the largest.

    Args:
      answers: of all questions of a benchmark, as ``plain_number`` gives them.

    Raises:
      UserError: too many answers are the same.
    """
    values = [Decimal(answer) for answer in answers]
    order = sorted(range(len(values)), key=lambda index: values[index])
    # A group takes every ``stride``-th question of a block, so that equal answers, which follow each other, part.
    blocks = max(len(values) // (COUNT * max(Counter(values).values(), default=1)), 1)
    choices: list[tuple[str, ...]] = [()] * len(values)
    for block in np.array_split(np.array(order, np.int64), blocks) if answers else ():
        stride = max(len(block) // COUNT, 1)
        for first in range(stride):
            group = block[first::stride].tolist()
            different = {values[index]: answers[index] for index in group}
            if len(different) < 2:
                raise UserError(
                    "--task.score=choice: too few questions have different answers to choose among: give more "
                    "questions, or another --task.score"
                )
            for index in group:
                choices[index] = tuple(different[value] for value in sorted(different))
    return choices


def plain_number(answer: str, where: str) -> str:
    """Return a number as it is written in choices: without thousands commas and dollar signs, "1,250.0" as "1250".

    Raises:
      UserError: the answer is no finite number; ``where`` names its row in the message.
    """
    try:
        value = Decimal(answer.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise UserError(f"{where}: the answer {answer!r} is no number: fix or remove the row")
    whole = value.to_integral_value()
    return f"{whole if whole == value else value.normalize():f}"
