"""A benchmark's items on a model: encoded with an answer each, and scored with and without edits."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from saejax.causal.study.references import Reference
from saejax.causal.study.results import ItemScore
from saejax.models.language_model import Edit, LanguageModel
from saejax.settings import TaskConfig
from saejax.tasks import benchmark_scores
from saejax.tasks.benchmark_definitions import Item, answer_tokens, way
from saejax.tasks.benchmark_prompts import make_prompter
from saejax.tasks.scored_items import ChosenItem, ReferenceItem, ScoredItem

EditsOf = Callable[[Sequence[int]], Sequence[Edit]]  # of the texts of a batch, given which item each is of
ITEMS = 16  # scored by log-likelihood between two looks whether to stop


class ItemScores:
    """What a model makes of the items of a benchmark.

    Args:
      name: of the benchmark.
      task: how its items are asked and judged.
      check_stop: called now and then; may raise to stop.
    """

    def __init__(self, lm: LanguageModel, name: str, task: TaskConfig, check_stop: Callable[[], None]):
        self._lm, self._name, self._task, self._check_stop = lm, name, task, check_stop
        self._way = way(name, task)
        self._prompter = make_prompter(name, task, lm.tokenizer)

    def reference(self, place: int, item: Item, answer: str, sign: float = 1.0) -> Reference:
        """An answer to an item, the one at this ``place`` in a list, as token ids; ``sign``: how its score counts."""
        pair = benchmark_scores.encode_answer(self._lm, self._prompter, item, self._prompter.prompt(item), answer)
        return Reference(place, *pair, sign)

    def solutions(self, items: Sequence[Item]) -> list[Reference]:
        """The items' reference solutions."""
        return [self.reference(place, item, item.solution) for place, item in enumerate(items)]

    def objectives(self, items: Sequence[Item]) -> list[Reference]:
        """Of each item its solution; of multiple choice the right choice, less the likeliest wrong one."""
        if self._way != "choice":
            return self.solutions(items)
        found = []
        rows = cast(list[ChosenItem], self._slices(items, unedited, self._way))
        for place, (item, row) in enumerate(zip(items, rows, strict=True)):
            wrong = [
                (total, choice)
                for total, choice in zip(row.log_likelihoods, item.choices, strict=True)
                if choice != item.answer
            ]
            found += [self.reference(place, item, item.answer), self.reference(place, item, max(wrong)[1], sign=-1.0)]
        return found

    def longest(self, items: Sequence[Item]) -> int:
        """The most tokens of an item's text: with an answer, its solution or what may be generated."""
        answered = [self.reference(0, item, answer) for item in items for answer in (*item.choices, item.solution)]
        new = answer_tokens(self._name, self._task) if self._way == "generate" else 0
        return max(len(one.context) + max(len(one.answer), new) for one in answered)

    def score(self, condition: str, items: Sequence[Item], edits: EditsOf, accuracy: bool) -> list[ItemScore]:
        """A row for each item: its reference's log-likelihood and tokens and, where it is judged, its answer.

        Args:
          condition: its name.
          items: to score.
          edits: on while the items are scored; items are named by their places.
          accuracy: whether answers are judged, or log-likelihoods of the references alone measured.
        """
        tokens = [len(reference.answer) for reference in self.solutions(items)]
        judged = self._slices(items, edits, self._way) if accuracy else []
        if judged and self._way == "choice":
            chosen = zip(items, cast(list[ChosenItem], judged), strict=True)
            totals = [row.log_likelihoods[item.choices.index(item.answer)] for item, row in chosen]
        else:
            solved = cast(list[ReferenceItem], self._slices(items, edits, "likelihood"))
            totals = [row.log_likelihood for row in solved]
        answers = [row.judged for row in judged] or [(None, None)] * len(items)
        return [
            ItemScore(condition, item.id, total, count, *answer)
            for item, total, count, answer in zip(items, totals, tokens, answers, strict=True)
        ]

    def _slices(self, items: Sequence[Item], edits: EditsOf, scored: str) -> list[ScoredItem]:
        """``score_items`` in a way, with looks in between whether to stop."""
        step = self._task.batch if scored == "generate" else ITEMS
        rows: list[ScoredItem] = []
        for first in range(0, len(items), step):
            self._check_stop()
            some = items[first : first + step]
            each = [len(item.choices) if scored == "choice" else 1 for item in some]
            texts = np.repeat(np.arange(first, first + len(some)), each).tolist()
            rows += benchmark_scores.score_items(self._lm, self._name, some, self._task, edits(texts), scored)
        return rows


def unedited(texts: Sequence[int]) -> Sequence[Edit]:
    """No edit."""
    return ()
