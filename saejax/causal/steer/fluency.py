"""What steering costs beside the answer: text that has nothing to do with it, and what the model goes on with."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from saejax.causal.steer.programs import SteeredTexts, SteeringEdit, steered_value
from saejax.interventions.split_model import SplitModel
from saejax.interventions.text import HeldOutText, TextDiffs
from saejax.models.edits import Positions
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode
from saejax.tasks.behaviours import Prompt
from saejax.tasks.likelihood import loglikelihoods

NEW_TOKENS = 20  # of a continuation


def on_text(split: SplitModel, text: HeldOutText, changes: Sequence[SteeredTexts]) -> TextDiffs:
    """Every change on held-out text, at all of its positions but attention sinks.

    Args:
      changes: a row of each for every turn; documents have them in turn.
    """

    def edited(number_B: np.ndarray, *sites: jax.Array) -> Iterator[jax.Array]:
        for change in changes:
            rows = change[number_B % len(change.added_RxD)]
            yield steered_value(split.point, split.dictionary, *sites, jax.tree.map(lambda a: split.by_row(a)[0], rows))

    return text.edited(split, edited)


def continued(
    model: LanguageModel, split: SplitModel, prompts: Sequence[Prompt], change: SteeredTexts, positions: str, seed: int
) -> tuple[float | None, str]:
    """Cross-entropy, under the clean model, of what the steered one goes on with; and the first of these texts.

    Tokens are drawn from the model's probabilities: the likeliest ones repeat themselves, which the clean model finds
    likely, too.

    Args:
      change: a row for each prompt.
      positions: "all" or "last"; new tokens are changed in either case.
      seed: of the draws.

    Returns:
      Nats per token, None where every text ends at once.
    """
    length = min(NEW_TOKENS, model.config.context - max(len(ids) for ids in (ids_of(model, p.text) for p in prompts)))
    if length < 1:
        return None, ""
    point, placed = split.point, jax.tree.map(jax.numpy.asarray, change)
    edit = SteeringEdit(split.dictionary, placed, Positions.parse(positions), point.reads, point.site)
    tokens = model.tokenize([prompt.text for prompt in prompts])
    found = model.generate(tokens, length, temperature=1.0, seed=seed, edits=[edit])
    went_on = [(ids_of(model, p.text), list(g.ids)) for p, g in zip(prompts, found, strict=True) if g.ids]
    if not went_on:
        return None, ""
    likelihoods = loglikelihoods(model, [before for before, _ in went_on], [after for _, after in went_on])
    return -sum(one.total for one in likelihoods) / sum(one.tokens for one in likelihoods), found[0].text


def ids_of(model: LanguageModel, text: str) -> list[int]:
    """The token ids of a text as a prompt."""
    return encode(model.tokenizer, text)
