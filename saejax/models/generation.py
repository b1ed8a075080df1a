"""Text that a language model goes on with: greedy or sampled, with edits on, up to stop strings."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError
from saejax.files import read_json
from saejax.models import decoding
from saejax.models.decoding import Edits, SamplingParams
from saejax.models.tokens import Tokens
from saejax.parallel.mesh import fitting_sharding

_LOOK_EVERY = 16  # new tokens between two looks for stop strings
_STEP = 32  # lengths are rounded up to a multiple of this, or to one of four lengths per power of two


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one prompt was continued with.

    Attributes:
      ids: the new token ids, without the one that ended the text; with a stop string, up to the token that completes
        it.
      text: what they say, up to the stop string; special tokens are left out.
      finished: why it ended: "eos" (the model ended it), "stop" (a stop string) or "length".
    """

    ids: tuple[int, ...]
    text: str
    finished: str


def generate(
    lm: Any,
    tokens: Tokens,
    max_new_tokens: int,
    sampling: SamplingParams,
    stop: Sequence[str],
    edits: Edits,
    cache: bool,
) -> list[Generated]:
    """Continues prompts. See ``LanguageModel.generate``."""
    longest = int(tokens.lengths_B.max())
    if max_new_tokens < 1 or longest + max_new_tokens > lm.config.context:
        raise UserError(
            f"{max_new_tokens} new tokens after a prompt of {longest}: expected at least 1, and together at most the "
            f"model's context of {lm.config.context}"
        )
    ends = _Ends(lm.tokenizer, eos_ids(lm.source.folder, lm.tokenizer), stop)
    run = _cached if cache else _recomputed
    rows: list[list[int]] = [[] for _ in tokens.lengths_B]
    found: list[Generated | None] = [None] * len(rows)
    for chunk_BxN in run(lm, tokens, max_new_tokens, sampling, ends, edits):
        for b, row in enumerate(rows):
            if found[b] is None:
                row.extend(chunk_BxN[b].tolist())
                found[b] = ends.find(row, len(row) - chunk_BxN.shape[1])
        if None not in found:
            break
    return [done or Generated(tuple(row), ends.text(row), "length") for row, done in zip(rows, found, strict=True)]


def sampling_params(temperature: float, top_p: float, seed: int) -> SamplingParams:
    """How tokens are chosen, as ``LanguageModel.generate`` says; a ``UserError`` for what is out of range."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: expected a number of at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: expected a number above 0 and at most 1")
    sampled = temperature > 0
    return SamplingParams(
        jnp.float32(temperature), jnp.float32(top_p), jax.random.key(seed), sampled, sampled and top_p < 1
    )


def eos_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json, else of config.json, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


class _Ends:
    """Finds where a continuation ends.

    Attributes:
      ids: the token ids that end it: end of text, and stop strings that are one special token.
      strings: the other stop strings.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int], stop: Sequence[str]):
        if isinstance(stop, str) or not all(stop):
            raise UserError(f"stop is {stop!r}: expected a list of strings, none of them empty")
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._tokenizer, self._eos = tokenizer, set(eos)
        self.ids = sorted({*eos, *(special[text] for text in stop if text in special)})
        self.strings = [text for text in stop if text not in special]

    def text(self, ids: Sequence[int]) -> str:
        """What the tokens say, without special ones."""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def find(self, ids: Sequence[int], start: int) -> Generated | None:
        """The end of a continuation, looked for from its token ``start`` on; None if it goes on."""
        end = next((i for i in range(start, len(ids)) if ids[i] in self.ids), len(ids))
        if any(string in self.text(ids[:end]) for string in self.strings):
            for count in range(start + 1, end + 1):
                text = self.text(ids[:count])
                places = [text.index(string) for string in self.strings if string in text]
                if places:
                    return Generated(tuple(ids[:count]), text[: min(places)], "stop")
        if end == len(ids):
            return None
        return Generated(tuple(ids[:end]), self.text(ids[:end]), "eos" if ids[end] in self._eos else "stop")


def _cached(
    lm: Any, tokens: Tokens, new: int, sampling: SamplingParams, ends: _Ends, edits: Edits
) -> Iterator[np.ndarray]:
    """Yields the new ids, some [B, n] at a time. After a prompt's end they mean nothing."""
    width = rounded(int(tokens.lengths_B.max()))
    ids_BxT = np.zeros((len(tokens.lengths_B), width), np.int32)
    for row, ids, length in zip(ids_BxT, tokens.ids_BxT, tokens.lengths_B, strict=True):
        row[width - length :] = ids[:length]
    pad_B = (width - tokens.lengths_B).astype(np.int32)
    end_ids_E = np.array(ends.ids or [-1], np.int32)
    step = _LOOK_EVERY if ends.strings else new
    state = decoding.prefill(
        lm.config, rounded(new), lm.params, _placed(lm, ids_BxT), _placed(lm, pad_B), end_ids_E, edits, sampling
    )
    for start in range(0, new, step):
        stop = min(start + step, new)
        state = decoding.decode(lm.config, lm.params, state, np.int32(stop), end_ids_E, edits, sampling)
        # A copy: the next call takes over the state's memory.
        new_BxN, finite_B = np.array(state.new_BxN)[:, start:stop], np.array(state.finite_B)
        _check_finite(finite_B)
        yield new_BxN


def _recomputed(
    lm: Any, tokens: Tokens, new: int, sampling: SamplingParams, ends: _Ends, edits: Edits
) -> Iterator[np.ndarray]:
    """Like ``_cached``, but every token by a forward pass over all that went before."""
    longest, batch = int(tokens.lengths_B.max()), np.arange(len(tokens.lengths_B))
    ids_BxT = np.zeros((len(batch), rounded(longest + new)), np.int32)
    ids_BxT[:, :longest] = np.where(tokens.mask_BxT, tokens.ids_BxT, 0)[:, :longest]
    lengths_B = tokens.lengths_B.astype(np.int32)
    for number in range(new):
        now_BxT = ids_BxT[:, : rounded(longest + number)]
        next_B, finite_B = decoding.recompute(
            lm.config, lm.params, _placed(lm, now_BxT), _placed(lm, lengths_B), np.int32(number), edits, sampling
        )
        _check_finite(np.asarray(finite_B))
        ids_BxT[batch, lengths_B] = np.asarray(next_B)
        lengths_B = lengths_B + 1
        yield np.asarray(next_B)[:, None]


def _placed(lm: Any, array: np.ndarray) -> jax.Array:
    """The array on the model's devices, prompts split over ``data``."""
    return jax.device_put(array, fitting_sharding(lm.mesh, array.shape, *("data", None)[: array.ndim]))


def _check_finite(finite_B: np.ndarray) -> None:
    if not finite_B.all():
        prompt = int(np.argmin(finite_B))
        raise UserError(
            f"the logits after prompt {prompt} of {len(finite_B)} are NaN or infinite: expected finite numbers; check "
            "the model's weights and the edits, or use --model.dtype=float32"
        )


def rounded(length: int) -> int:
    """The length of a program: 32, 64, 96, 128, 160, 192, 224, 256, 320, ...: few, so that few are compiled."""
    step = max(_STEP, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step
