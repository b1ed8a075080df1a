"""Scores of a benchmark: the model's answer to each item of a benchmark, and the figures over all items.

- ``generate``: greedy answers, right by exact match (``answers``), under a strict and a flexible rule.
- ``choice``: every choice is scored by its log-likelihood after the prompt. The model's answer is the likeliest one
  (``raw``), or the likeliest one per character of the choice (``normalised``); lm-evaluation-harness calls these
  accuracies acc and acc_norm.
- ``likelihood``: log-likelihood per token of the reference solution, and the share of its tokens that were the
  likeliest where they stand. It tells models apart that are too weak to generate a right answer.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np

from saejax.errors import UserError
from saejax.models.language_model import Edit, LanguageModel
from saejax.models.tokens import pad
from saejax.results import Interval
from saejax.statistics.intervals import bootstrap_mean, wilson
from saejax.tasks.answers import Verdict, formula_verdicts, number_verdicts
from saejax.tasks.benchmark_definitions import Item, answer_tokens, definition, way
from saejax.tasks.benchmark_prompts import Prompter, make_prompter
from saejax.tasks.likelihood import Likelihood, encode_pair, loglikelihoods
from saejax.tasks.results import BenchmarkResults, ChoiceScores, UnparsedExample
from saejax.tasks.scored_items import ChosenItem, GeneratedItem, ReferenceItem, ScoredItem
from saejax.tasks.settings import TaskConfig

_VERDICTS: dict[str, Callable[[str, str], dict[str, Verdict]]] = dict(gsm8k=number_verdicts, math=formula_verdicts)
_SHOWN = 3  # answers without a final answer that are shown
_TEXT = 300  # characters of them, from the end


def score_items(
    lm: LanguageModel, name: str, items: Sequence[Item], task: TaskConfig, edits: Sequence[Edit] = (), scored: str = ""
) -> list[ScoredItem]:
    """Return the score of each item of a benchmark.

    Args:
      lm: the model.
      name: name of the benchmark.
      items: items as ``benchmarks.read_items`` returns them.
      task: settings of the prompts and of the scoring.
      edits: changes to every forward pass, generation included.
      scored: "generate", "choice" or "likelihood"; "": as the settings say. Prompts do not depend on it.

    Returns:
      A score for each item, of the class in ``scored_items.WAYS`` for this way of scoring.

    Raises:
      UserError: a prompt and its answer are longer than the model's context, or an option does not fit.
    """
    prompter, scored, edits = make_prompter(name, task, lm.tokenizer, lm.bos), scored or way(name, task), tuple(edits)
    if not items:
        return []
    prompts = [prompter.prompt(item) for item in items]
    pairs_of = zip(items, prompts, strict=True)
    about = [(item.id, item.task, item.question, prompt, item.answer) for item, prompt in pairs_of]
    if scored == "generate":
        return [*_generate(lm, prompter, items, about, task, edits)]
    # Choices, or solutions, of all items in one list: batches are filled across items.
    answers = [item.choices if scored == "choice" else (item.solution,) for item in items]
    pairs = [
        encode_answer(lm, prompter, item, prompt, answer)
        for item, prompt, of_item in zip(items, prompts, answers, strict=True)
        for answer in of_item
    ]
    likelihoods = iter(loglikelihoods(lm, [context for context, _ in pairs], [answer for _, answer in pairs], edits))
    make = _choose if scored == "choice" else _reference
    return [
        make(item, fields, [next(likelihoods) for _ in of_item])
        for item, fields, of_item in zip(items, about, answers, strict=True)
    ]


_About = tuple[str, str, str, str, str]  # fields of a ``ScoredItem``


def _generate(
    lm: LanguageModel,
    prompter: Prompter,
    items: Sequence[Item],
    about: Sequence[_About],
    task: TaskConfig,
    edits: Sequence[Edit],
) -> Iterator[GeneratedItem]:
    ids, most = [prompter.encode(prompt) for _, _, _, prompt, _ in about], answer_tokens(prompter.name, task)
    for item, prompt_ids in zip(items, ids, strict=True):
        _check_length(lm, prompter, item, len(prompt_ids), most, " or --task.max_new_tokens")
    for first in range(0, len(ids), task.batch):
        batch = slice(first, first + task.batch)
        answers = lm.generate(pad(ids[batch]), most, stop=definition(prompter.name).stop, edits=edits)
        for item, fields, answer in zip(items[batch], about[batch], answers, strict=True):
            verdicts = _VERDICTS[prompter.name](answer.text, item.answer)
            yield GeneratedItem(*fields, answer.text, answer.finished, verdicts["strict"], verdicts["flexible"])


def _choose(item: Item, about: _About, likelihoods: Sequence[Likelihood]) -> ChosenItem:
    totals = [likelihood.total for likelihood in likelihoods]
    # By character, not by token, so that figures of models with other vocabularies compare.
    per_character = [total / len(choice) for total, choice in zip(totals, item.choices, strict=True)]
    chosen = (item.choices[int(np.argmax(scores))] for scores in (totals, per_character))
    return ChosenItem(*about, item.choices, totals, *(Verdict(choice, choice == item.answer) for choice in chosen))


def _reference(item: Item, about: _About, likelihoods: Sequence[Likelihood]) -> ReferenceItem:
    (likelihood,) = likelihoods
    share = likelihood.correct_tokens / likelihood.tokens
    return ReferenceItem(*about, item.solution, likelihood.tokens, likelihood.total, likelihood.per_token, share)


def encode_answer(
    lm: LanguageModel, prompter: Prompter, item: Item, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """Return the token ids of an item's prompt and of an answer after it; refuse more than the model reads."""
    pair = encode_pair(lm.tokenizer, prompt, prompter.delimiter + answer, prompter.bos)
    _check_length(lm, prompter, item, len(pair[0]), len(pair[1]))
    return pair


def _check_length(
    lm: LanguageModel, prompter: Prompter, item: Item, prompt: int, answer: int, else_lower: str = ""
) -> None:
    if prompt + answer > lm.config.context:
        raise UserError(
            f"{prompter.name}, item {item.id}: its prompt has {prompt} tokens, which with {answer} of the answer is "
            f"more than the model's context of {lm.config.context}: lower --task.shots (now {prompter.shots})"
            f"{else_lower}"
        )


def summarize(name: str, rows: Sequence[ScoredItem], task: TaskConfig, origin: str = "") -> BenchmarkResults:
    """Return the figures over all items of a benchmark, with 95 % intervals, Wilson's of accuracies.

    Args:
      name: name of the benchmark.
      rows: scores from ``score_items``, at least one.
      task: settings under which the items were scored.
      origin: the source of the items, in words.
    """
    score = way(name, task)
    results = BenchmarkResults(score, len(rows), origin)
    if score == "likelihood":
        solved = cast(Sequence[ReferenceItem], rows)
        return dataclasses.replace(
            results,
            log_likelihood_per_token=_interval([row.log_likelihood_per_token for row in solved], task),
            token_accuracy=_interval([row.token_accuracy for row in solved], task),
        )
    if score == "choice":
        chosen, rules = cast(Sequence[ChosenItem], rows), ("raw", "normalised")
        parts = dict.fromkeys(row.task for row in chosen)
        rows_by_part = {part: [row for row in chosen if row.task == part] for part in parts}
        return dataclasses.replace(
            results,
            accuracy=_accuracies(chosen, rules),
            # The mean over items, as they differ in their number of choices.
            chance=float(np.mean([1 / len(row.choices) for row in chosen])),
            tasks={
                part: ChoiceScores(len(group), **_accuracies(group, rules))
                for part, group in rows_by_part.items()
                if part
            },
        )
    written, rules = cast(Sequence[GeneratedItem], rows), ("strict", "flexible")
    unparsed = {rule: [row for row in written if getattr(row, rule).answer is None] for rule in rules}
    # The end of an answer shows why no final answer is found in it.
    shown = (UnparsedExample(row.id, row.output[-_TEXT:]) for row in unparsed["strict"][:_SHOWN])
    return dataclasses.replace(
        results,
        accuracy=_accuracies(written, rules),
        unparsed={rule: len(without) for rule, without in unparsed.items()},
        unparsed_examples=tuple(shown),
        cut=sum(row.finished == "length" for row in written),
    )


def _accuracies(rows: Sequence[ScoredItem], rules: Sequence[str]) -> dict[str, Interval]:
    return {rule: wilson(np.array([getattr(row, rule).correct for row in rows])) for rule in rules}


def _interval(values: Sequence[float], task: TaskConfig) -> Interval:
    return bootstrap_mean(np.array(values, np.float64), task.seed)
