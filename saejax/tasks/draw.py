"""Prompts of the behaviours that come with saejax, drawn by seed.

A behaviour's *content items* (nouns, places, years and events, pairs of numbers in whatever order) are first dealt out
to the two splits, so that no item stands in both. A prompt whose answers the model's tokenizer does not keep apart from
the text, or from each other, is left out, counted, and another drawn.
"""

import collections
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.errors import UserError, one_of
from saejax.models.tokens import continuation_ids, is_known
from saejax.tasks.answer_tokens import fault
from saejax.tasks.behaviours import SPLITS, Prompt
from saejax.tasks.recipes import Recipe, recipes

_PATIENCE = 3000  # drafts in a row without a new prompt, after which there are none


class TooFewPrompts(UserError):
    """A behaviour has too few prompts that suit this model's tokenizer."""


class Drawn(NamedTuple):
    """Prompts of a behaviour, train prompts first, and the number of drafts that were left out, by reason."""

    prompts: list[Prompt]
    replaced: dict[str, int]


def make_prompts(
    behaviour: str, train: int, test: int, seed: int, tokenizer: Any, recipe: Recipe | None = None
) -> Drawn:
    """Draw the prompts of a behaviour; the result depends on the arguments alone.

    Args:
      behaviour: one of ``settings.BEHAVIOURS``.
      train: number of train prompts, at least 1; all are different.
      test: number of test prompts, at least 1; all are different. No content item occurs in both splits, and only test
        prompts use the behaviour's last template.
      seed: seed of the draws, at least 0.
      tokenizer: the model's tokenizer; see ``answer_tokens.fault``.
      recipe: of the behaviour; None: the one that comes with saejax.

    Raises:
      TooFewPrompts: too few prompts suit this tokenizer.
      UserError: the word lists give too few prompts.
    """
    recipe = recipe or recipes()[one_of(behaviour, recipes(), "behaviour")]
    if train < 1 or test < 1:
        raise UserError(f"{train} train and {test} test prompts were asked for: expected at least 1 of each")
    # By the behaviour's name: its prompts do not depend on which others are drawn; ``hash`` differs by process.
    rng = np.random.default_rng((seed, zlib.crc32(behaviour.encode())))
    pools: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
    for kind, items in recipe.pools.items():
        if kind == recipe.one_token:
            items = _single_tokens(behaviour, kind, items, tokenizer)
        # Items are dealt out before prompts are made: no noun or place that a feature was chosen on is in its test.
        shuffled = [items[i] for i in rng.permutation(len(items))]
        for split, n in zip(SPLITS, _shares(len(items), train, test, recipe.least), strict=True):
            pools[split][kind] = [shuffled.pop() for _ in range(n)]
    prompts: list[Prompt] = []
    replaced: collections.Counter[str] = collections.Counter()
    for split, n in zip(SPLITS, (train, test), strict=True):
        templates, draft = len(recipe.of_split(split)), _drafts(behaviour, split, recipe, rng, pools[split])
        prompts += _fitting(draft, n, templates, tokenizer, replaced)
    return Drawn(prompts, dict(replaced))


def _single_tokens(behaviour: str, kind: str, items: Sequence[str], tokenizer: Any) -> list[str]:
    """Return the items that are one token after a space; a ``TooFewPrompts`` where these are fewer than four."""
    ids = {item: continuation_ids(tokenizer, f" {item}") for item in items}
    kept = [item for item in items if len(ids[item]) == 1 and is_known(tokenizer, item, ids[item])]
    if len(kept) < 4:
        raise TooFewPrompts(
            f"{len(kept)} of {len(items)} {kind} of {behaviour} are single tokens of this tokenizer: "
            "expected at least 4"
        )
    return kept


def _drafts(
    behaviour: str, split: str, recipe: Recipe, rng: np.random.Generator, pools: Mapping[str, Sequence]
) -> Callable[[int], Prompt]:
    """Return a function that drafts the next prompt of a split, given the number of prompts kept so far."""
    draft, templates = recipe.drawer(rng, **pools), recipe.of_split(split)

    def prompt(kept: int) -> Prompt:
        turn, place = divmod(kept, len(templates))
        template = templates[place]
        # The counter of a template's drafts alternates, and starts at the template's index: recipes that use its
        # parity draw as many even as odd drafts for each template and for all together.
        text, correct, counterpart, wrong, items = draft(turn + place, template)
        return Prompt(behaviour, split, text, correct, wrong, counterpart, wrong, items, template)

    return prompt


def _fitting(
    draft: Callable[[int], Prompt], n: int, templates: int, tokenizer: Any, replaced: collections.Counter[str]
) -> list[Prompt]:
    """Return the first n different prompts without a fault; ``replaced`` counts the others by their fault."""
    kept: dict[str, Prompt] = {}
    left_out: dict[str, Prompt] = {}
    tries = 0
    while len(kept) < n:
        prompt, tries = draft(len(kept)), tries + 1
        if prompt.text in kept or prompt.text in left_out:
            pass
        elif why := fault(tokenizer, prompt):
            left_out[prompt.text] = prompt
            replaced[why] += 1
        else:
            # Drafts since the last new prompt count: a long list of prompts takes many drafts without being at its end.
            kept[prompt.text], tries = prompt, 0
        if tries < _PATIENCE:
            continue
        available = sum(drawn.template == prompt.template for drawn in (*kept.values(), *left_out.values()))
        if templates * available < n:  # too few for any tokenizer
            raise UserError(
                f"the word lists of {prompt.behaviour} give {len(kept)} {prompt.split} prompts of {n}, and no more of "
                f"the template {prompt.template!r}: lower --task.train_prompts or --task.test_prompts, which share them"
            )
        reasons = "; ".join(f"{why} ({count} drafts)" for why, count in replaced.items())
        raise TooFewPrompts(
            f"{len(kept)} of {n} {prompt.split} prompts could be made, and no more of the template "
            f"{prompt.template!r}: {reasons}"
        )
    return list(kept.values())


def _shares(items: int, train: int, test: int, least: int) -> tuple[int, int]:
    """Return the numbers of a kind's items for train and test: in proportion, but ``least`` to each."""
    for_test = min(max(-(-items * test // (train + test)), least), items - least)
    return items - for_test, for_test
