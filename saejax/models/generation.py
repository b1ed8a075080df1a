"""Text generation: where a continuation ends, and its text. The tokens come from ``decoding`` or from another model."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.files import read_foreign
from saejax.models.tokens import continuation_text, special_tokens
from saejax.progress import OnProgress
from saejax.short_reprs import has_short_repr

CHUNK = 16  # new tokens between two looks for stop strings


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt."""

    #: new token ids, without the one that ended the text; with a stop string, up to the token that completes it.
    ids: tuple[int, ...]
    text: str  #: what the ids add to the prompt's text, without special tokens, up to the stop string
    finished: str  #: why it ended: "eos" (the model ended it), "stop" (a stop string) or "length"


def eos_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a text, from generation_config.json, else from config.json, else from the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        fields = read_foreign(folder / name, "a model's settings") if (folder / name).is_file() else {}
        ids = fields.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def check_limit(lengths_B: np.ndarray, max_new_tokens: int, context: int) -> None:
    """Raise a ``UserError`` unless prompts of the lengths and ``max_new_tokens``, at least 1, fit into the context."""
    longest = int(lengths_B.max())
    if not isinstance(max_new_tokens, Integral):
        raise UserError(f"max_new_tokens is {max_new_tokens!r}: expected a whole number")
    if max_new_tokens < 1 or longest + max_new_tokens > context:
        raise UserError(
            f"{max_new_tokens} new tokens after a prompt of {longest}: expected at least 1, and together at most the "
            f"model's context of {context}"
        )


class StopCondition:
    """Condition that ends continuations: a token id or a stop string.

    Attributes:
      ids: token ids that end a text: end of text, and stop strings that are one special token.
      strings: the other stop strings.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int], stop: Sequence[str]):
        are_texts = isinstance(stop, Sequence) and all(isinstance(text, str) and text for text in stop)
        if isinstance(stop, str) or not are_texts:
            raise UserError(f"stop is {stop!r}: expected a list of strings, none of them empty")
        if stop and tokenizer is None:
            raise UserError("this model has no tokenizer: expected no stop strings")
        special = special_tokens(tokenizer) if tokenizer else {}
        self._tokenizer, self._eos, self._special = tokenizer, set(eos), tuple(special)
        self.ids = sorted({*eos, *(special[text] for text in stop if text in special)})
        self.strings = [text for text in stop if text not in special]
        #: stop strings with a special token in them, which decoded texts lack.
        self._with_special = [text for text in self.strings if any(token in text for token in special)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens; "" for a model without a tokenizer."""
        if self._tokenizer is None:
            return ""
        return continuation_text(self._tokenizer, ids, skip_special_tokens=True)

    def _before_stop(self, ids: Sequence[int]) -> str | None:
        """Return the text of the ids up to the first stop string, without special tokens; None if there is none."""
        text = self.decode(ids)
        before = [text[: text.index(string)] for string in self.strings if string in text]
        if self._with_special:
            whole = continuation_text(self._tokenizer, ids)
            for string in self._with_special:
                if string not in whole:
                    continue
                # The text before it is shown without special tokens, as by ``decode``.
                shown = whole[: whole.index(string)]
                for token in self._special:
                    shown = shown.replace(token, "")
                before.append(shown)
        return min(before, key=len, default=None)

    def cut(self, ids: Sequence[int], start: int) -> Generated | None:
        """Return the continuation up to its end, searched from token ``start`` on; None if it has not ended."""
        end = next((i for i in range(start, len(ids)) if ids[i] in self.ids), len(ids))
        # In the whole text first: decoding token by token is slow, and most chunks end nothing.
        if self.strings and self._before_stop(ids[:end]) is not None:
            # The first token that completes a stop string: strings need not begin or end where tokens do.
            for count in range(start + 1, end + 1):
                if (text := self._before_stop(ids[:count])) is not None:
                    return Generated(tuple(ids[:count]), text, "stop")
        if end == len(ids):
            return None
        return Generated(tuple(ids[:end]), self.decode(ids[:end]), "eos" if ids[end] in self._eos else "stop")


def count_tokens(chunks: Iterable[np.ndarray], total: int, on_progress: OnProgress) -> Iterator[np.ndarray]:
    """Yield chunks of new tokens [B, n], and report how many tokens there are of each prompt."""
    done = 0
    for chunk_BxN in chunks:
        done += chunk_BxN.shape[1]
        on_progress(done, total)
        yield chunk_BxN


def collect(chunks: Iterable[np.ndarray], prompts: int, condition: StopCondition) -> list[Generated]:
    """Collect new tokens, chunks of [B, n], until the continuation of each of B prompts has ended."""
    rows: list[list[int]] = [[] for _ in range(prompts)]
    ended: list[Generated | None] = [None] * prompts
    for chunk_BxN in chunks:
        for b, row in enumerate(rows):
            if ended[b] is None:
                row.extend(chunk_BxN[b].tolist())
                ended[b] = condition.cut(row, len(row) - chunk_BxN.shape[1])
        if None not in ended:
            break
    return [
        generated or Generated(tuple(row), condition.decode(row), "length")
        for row, generated in zip(rows, ended, strict=True)
    ]
