"""Examples in front of a prompt, which ask for the other answer without touching an activation.

The examples of a target are train prompts to which it is the wrong answer, each with it after all; beside them, the
same prompts with their right answers. An example stands on lines of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.interventions.text import HeldOutText
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode
from saejax.tasks.behaviours import Prompt
from saejax.tasks.likelihood import loglikelihoods

SHOTS = 4  # examples, or as many as there are


def prefixes(train: Sequence[Prompt], wrong_N: np.ndarray, side: str, seed: int) -> dict[int, str]:
    """For each target its examples, a text that ends in a line break.

    Args:
      train: N prompts.
      wrong_N: token ids of their wrong answers.
      side: of the prompts, what completes them: "wrong" or "correct".
      seed: of the choice of examples.
    """
    order_N = np.random.default_rng(seed).permutation(len(train))
    found = {}
    for target in np.unique(wrong_N).tolist():
        chosen = [train[n] for n in order_N if wrong_N[n] == target][:SHOTS]
        found[target] = "".join(f"{prompt.text}{getattr(prompt, side)}\n" for prompt in chosen)
    return found


def prefixed(
    model: LanguageModel, prompts: Sequence[Prompt], targets: Sequence[int], examples: Mapping[int, str]
) -> list[Prompt] | None:
    """The prompts behind the examples of their targets; None if one has no examples or is longer than the context."""
    if not all(target in examples for target in targets):
        return None
    found = [dataclasses.replace(p, text=examples[t] + p.text) for p, t in zip(prompts, targets, strict=True)]
    longest = max(len(encode(model.tokenizer, prompt.text)) for prompt in found)
    return found if longest <= model.config.context else None


def text_rise(model: LanguageModel, text: HeldOutText, examples: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What examples in front of them cost documents, as far as both fit the context together.

    Args:
      examples: of each document.

    Returns:
      By how much the cross-entropy of each rises, nats summed over its tokens, and how many tokens these are, [N] each.
    """
    special = set(model.tokenizer.all_special_ids)
    alone, behind, rests = [], [], []
    for document, example in zip(text.documents, examples, strict=True):
        before = encode(model.tokenizer, example)
        behind.append([*before, *document[: int(not before or document[0] not in special)]])
        alone.append(document[:1])
        rests.append(document[1 : 1 + max(model.config.context - len(behind[-1]), 1)])
    totals = [[one.total for one in loglikelihoods(model, side, rests)] for side in (alone, behind)]
    return -np.diff(totals, axis=0)[0], np.array([len(rest) for rest in rests])
