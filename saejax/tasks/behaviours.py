"""Behaviours: prompts with a correct and a wrong answer, and the same prompt turned around.

Of every behaviour there are train prompts, which choose features, and test prompts, which judge them. The behaviour's
*content items* (nouns, countries, years and events, ordered pairs of digits) are first dealt out to the two splits, so
that no item stands in both; ``recipes`` says what the behaviours are.

Each prompt has a *counterpart*: the same text with other content, for which the wrong answer is the better one and the
correct answer the worse one. What does not depend on the content cannot be right about both.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.errors import UserError, one_of
from saejax.tasks.recipes import Draft, Recipe, recipes
from saejax.workspace import write_text

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt whose last position predicts an answer.

    Attributes:
      behaviour: its name.
      split: "train" or "test".
      text: what the model reads.
      correct: the correct answer as it goes on from ``text``, with a leading space where a word follows.
      wrong: a wrong answer, with another first token. It is the counterpart's correct answer.
      counterpart: the text with other content; in SmolLM2's tokens as long as ``text``. "" if a prompt of the user's
        own has none.
      counterpart_correct: the better answer to ``counterpart``.
      items: the content items of the text and of its counterpart; none of prompts of the user's own.
      template: the words around the content; prompts of one template are not independent. "" if it is not known.
    """

    behaviour: str
    split: str
    text: str
    correct: str
    wrong: str
    counterpart: str = ""
    counterpart_correct: str = ""
    items: tuple[str, ...] = ()
    template: str = ""


def make_prompts(behaviour: str, train: int, test: int, seed: int, first_token: Callable[[str], int]) -> list[Prompt]:
    """Draws the prompts of a behaviour, train prompts first; which ones depends on the first four arguments only.

    Args:
      behaviour: one of ``settings.BEHAVIOURS``.
      train: number of train prompts, at least 1; all are different.
      test: number of test prompts, likewise; no content item stands in both splits.
      seed: of the choice, at least 0.
      first_token: the id of an answer's first token, such as ``LanguageModel.token_id``.

    Raises:
      UserError: the word lists do not give so many prompts, or the two answers to a prompt begin with the same token.
    """
    recipe = recipes()[one_of(behaviour, recipes(), "behaviour")]
    if train < 1 or test < 1:
        raise UserError(f"{train} train and {test} test prompts were asked for: expected at least 1 of each")
    _check_capacity(behaviour, recipe, train, test)
    rng = np.random.default_rng((seed, zlib.crc32(behaviour.encode())))
    pools: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
    for kind, items in recipe.pools.items():
        shuffled = [items[i] for i in rng.permutation(len(items))]
        for split, n in zip(SPLITS, _shares(len(items), train, test, recipe.least), strict=True):
            pools[split][kind] = [shuffled.pop() for _ in range(n)]
    prompts = []
    for split, n in zip(SPLITS, (train, test), strict=True):
        for draft in _distinct(recipe.drawer(rng, **pools[split]), n):
            text, correct, counterpart, wrong, items = draft
            prompts.append(Prompt(behaviour, split, text, correct, wrong, counterpart, wrong, items))
    for prompt in prompts:
        check_answers(prompt, first_token, f"leave {behaviour} out of --task.behaviours, or try another --task.seed")
    return prompts


def check_answers(prompt: Prompt, first_token: Callable[[str], int], advice: str) -> None:
    """A ``UserError``, with what to do about it, if the two answers to a prompt begin with the same token."""
    if first_token(prompt.correct) == first_token(prompt.wrong):
        raise UserError(
            f"{prompt.behaviour}, {prompt.split} prompt {prompt.text!r}: the answers {prompt.correct!r} and "
            f"{prompt.wrong!r} begin with the same token of this model: {advice}"
        )


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """What the model makes of a prompt; the baseline adds it to the prompt's line.

    Attributes:
      logit_diff: logit of the correct answer's first token minus the wrong one's, at the last position.
      top1: whether the correct one is the highest of all.
      counterpart_logit_diff: of the counterpart, its own correct answer first; None if there is none.
    """

    logit_diff: float
    top1: bool
    counterpart_logit_diff: float | None


SCORES = tuple(field.name for field in dataclasses.fields(PromptScore))


def write_prompts(path: Path, prompts: Sequence[Prompt], scores: Sequence[PromptScore] | None = None) -> None:
    """Writes prompts as JSON lines, each with its scores if there are any."""
    added = [dataclasses.asdict(score) for score in scores] if scores is not None else [{}] * len(prompts)
    lines = [
        json.dumps(dataclasses.asdict(prompt) | score, ensure_ascii=False, allow_nan=False) + "\n"
        for prompt, score in zip(prompts, added, strict=True)
    ]
    write_text(path, "".join(lines))


def read_prompts(path: Path) -> list[Prompt]:
    """Reads what ``write_prompts`` wrote, without the scores.

    Raises:
      UserError: the file is missing, or a line is not a prompt; the message names the line.
    """

    def prompt(record: dict[str, Any]) -> Prompt:
        fields = {key: value for key, value in record.items() if key not in SCORES}
        return Prompt(**fields | dict(items=tuple(fields["items"])))

    return _read_lines(path, prompt, "a prompt")


def read_logit_diffs(path: Path) -> list[float]:
    """The clean logit difference of every prompt that ``read_prompts`` reads, in the same order.

    Raises:
      UserError: as ``read_prompts``, or a prompt has no score.
    """
    return _read_lines(path, lambda record: float(record["logit_diff"]), "a prompt with its scores")


def _read_lines(path: Path, read: Callable[[dict[str, Any]], Any], what: str) -> list[Any]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # other line separators are part of a text
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run the stage baseline first") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found.append(read(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"line {number} of {path} is not {what}: the file is damaged; delete its folder and run the stage "
                "baseline again"
            ) from None
    return found


def _distinct(draft: Callable[[int], Draft], n: int) -> list[Draft]:
    """The first n drafts with different texts."""
    drafts: dict[str, Draft] = {}
    while len(drafts) < n:
        new = draft(len(drafts))
        drafts.setdefault(new.text, new)
    return list(drafts.values())


def _shares(items: int, train: int, test: int, least: int) -> tuple[int, int]:
    """How many of a kind's items go to train and to test: in proportion, but ``least`` to each."""
    for_test = min(max(-(-items * test // (train + test)), least), items - least)
    return items - for_test, for_test


def _fits(recipe: Recipe, train: int, test: int) -> bool:
    shares = {kind: _shares(len(items), train, test, recipe.least) for kind, items in recipe.pools.items()}
    room = [recipe.capacity(**{kind: share[side] for kind, share in shares.items()}) for side in (0, 1)]
    return train <= room[0] and test <= room[1]


def _check_capacity(behaviour: str, recipe: Recipe, train: int, test: int) -> None:
    if _fits(recipe, train, test):
        return
    most = recipe.capacity(**{kind: len(items) for kind, items in recipe.pools.items()})
    # The larger number is the one to lower, unless the smaller one alone is too large.
    for split, other in (SPLITS, SPLITS[::-1]) if train >= test else (SPLITS[::-1], SPLITS):
        asked = dict(train=train, test=test)
        for n in range(min(asked[split], most), 0, -1):
            if _fits(recipe, **asked | {split: n}):
                raise UserError(
                    f"the word lists of {behaviour} give at most {n} {split} prompts beside {asked[other]} {other} "
                    f"prompts, but {asked[split]} were asked for: lower --task.{split}_prompts"
                )
    raise UserError(
        f"the word lists of {behaviour} give at most {most} prompts in all, but {train} train and {test} test prompts "
        "were asked for: lower --task.train_prompts and --task.test_prompts"
    )
