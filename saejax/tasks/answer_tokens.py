"""The tokens of an answer: the tokens that it adds to its prompt's.

An answer that stands alone may have other tokens than one that goes on from a text: SentencePiece vocabularies put a
marker of a word's beginning before what stands alone, and others that join digits or letters may join the answer's with
the prompt's. So a prompt and its answer are tokenised together, and what is longer than the prompt alone is the answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import continuation_ids, is_known
from saejax.tasks.behaviours import Prompt

MERGED = "an answer is joined with the end of the text"
ALIKE = "both answers begin with the same token"
UNKNOWN = "an answer begins with what the tokenizer does not know"
OTHER = "after the counterpart an answer begins with another token"


def answer_ids(tokenizer: Any, text: str, answer: str) -> list[int]:
    """Return the token ids of an answer that continues a text, at least one.

    Raises:
      UserError: the text's own tokens are other ones when the answer follows, so that no token begins the answer; or
        that is the one of all unknown texts.
    """
    ids = continuation_ids(tokenizer, answer, text)
    if not ids:
        raise UserError(
            f"the answer {answer!r} has no token of its own after {text!r}: {MERGED}; write it so that the answer "
            "begins a word, or follows a mark such as '=' or '$'"
        )
    if not is_known(tokenizer, answer, ids):
        raise UserError(f"the answer {answer!r} has the token of all unknown texts: {UNKNOWN}; write it otherwise")
    return ids


def first_answer_ids(lm: LanguageModel, prompts: Sequence[Prompt]) -> np.ndarray:
    """Return the first tokens of each prompt's correct and wrong answer, int32 [N, 2].

    Raises:
      UserError: see ``answer_ids`` and ``check_ids``.
    """
    answers = [[(prompt.text, prompt.correct), (prompt.text, prompt.wrong)] for prompt in prompts]
    ids_Nx2 = np.array([[answer_ids(lm.tokenizer, *pair)[0] for pair in pairs] for pairs in answers], np.int32)
    return check_ids(lm, prompts, ids_Nx2)


def check_ids(lm: LanguageModel, prompts: Sequence[Prompt], ids_Nx2: np.ndarray) -> np.ndarray:
    """Return the first tokens of prompts' answers.

    Raises:
      UserError: the model lacks one of them, as it may lack special tokens of its tokenizer.
    """
    for place in np.flatnonzero((ids_Nx2 >= lm.config.vocab).any(axis=1))[:1]:
        raise UserError(
            f"an answer to {prompts[place].text!r:.60} begins with the token id {ids_Nx2[place].max()}, which the "
            f"model lacks: expected 0 to {lm.config.vocab - 1}"
        )
    return ids_Nx2


def different_answer_ids(lm: LanguageModel, prompts: Sequence[Prompt]) -> np.ndarray:
    """Return ``first_answer_ids`` where both answers of each prompt differ; a ``UserError`` otherwise, too."""
    ids_Nx2 = first_answer_ids(lm, prompts)
    for place in np.flatnonzero(ids_Nx2[:, 0] == ids_Nx2[:, 1])[:1]:
        raise UserError(
            f"{ALIKE} in prompt {place}, counted from 0, {prompts[place].text!r:.60}: their logit difference is always "
            "0; give answers whose first tokens differ"
        )
    return ids_Nx2


def fault(tokenizer: Any, prompt: Prompt) -> str:
    """Return why a prompt's answers cannot be told apart by their first tokens; "" if they can."""
    texts = [prompt.text, *([prompt.counterpart] if prompt.counterpart else [])]
    answers = (prompt.correct, prompt.wrong)
    first_ids = [[continuation_ids(tokenizer, answer, text)[:1] for answer in answers] for text in texts]
    if not all(map(all, first_ids)):
        return MERGED
    if not all(is_known(tokenizer, *pair) for pair in zip(answers, first_ids[0], strict=True)):
        return UNKNOWN
    if first_ids[0][0] == first_ids[0][1]:
        return ALIKE
    # Both texts must begin the answers alike: patching compares the same two logits on either.
    return "" if first_ids[0] == first_ids[-1] else OTHER
