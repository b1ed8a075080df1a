"""Prompts and their counterparts: which of them fit together, in what groups they run, and what stands where."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from saejax.causal.patching.results import TokenColumn
from saejax.errors import UserError
from saejax.interventions.engine import prefetch
from saejax.interventions.split_model import CleanRun, SplitModel, groups_by_length, in_order, slices
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.models.tokens import token_text
from saejax.parallel.collectives import to_host
from saejax.runner.parts import OnProgress
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

GROUP_BYTES = 2**28  # most memory of a recorded run, unless a few prompts need more
STEP = 8  # batches, and groups of prompts, are filled up to a multiple of this many rows
FEW = 8  # pairs of which the vectors of all heads are kept at once


class Pairs(NamedTuple):
    """P prompts and their counterparts, filled up with copies to B.

    Attributes:
      index_P: the prompts' places in the list they came from.
      ids_2xBxT: token ids of the prompts, then of the counterparts, int32.
      last_B: index of each prompt's last token, int32.
      answers_Bx2: token ids of the correct and the wrong answer, int32.
    """

    index_P: np.ndarray
    ids_2xBxT: np.ndarray
    last_B: np.ndarray
    answers_Bx2: np.ndarray

    @property
    def ends_P(self) -> np.ndarray:
        """How many tokens each prompt has, int64."""
        return self.last_B[: len(self.index_P)].astype(np.int64) + 1


def fitting_pairs(
    model: LanguageModel, prompts: Sequence[Prompt], split: str = "test"
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of a split with a counterpart of as many tokens, and how many others there are, by why."""
    own = [prompt for prompt in prompts if prompt.split == split]
    paired = [prompt for prompt in own if prompt.counterpart]
    fitting: list[Prompt] = []
    if paired:
        sides = [model.tokenize([getattr(p, side) for p in paired]).lengths_B for side in ("text", "counterpart")]
        fitting = [prompt for prompt, same in zip(paired, sides[0] == sides[1], strict=True) if same]
    return fitting, {"no counterpart": len(own) - len(paired), "other length": len(paired) - len(fitting)}


def describe_columns(model: LanguageModel, prompts: Sequence[Prompt]) -> tuple[TokenColumn, ...]:
    """What stands at each position, counted from the end, first position first."""
    text = token_text(model.tokenizer)
    sides = [model.tokenize([getattr(p, side) for p in prompts]) for side in ("text", "counterpart")]
    columns = []
    for position in range(-int(sides[0].lengths_B.max()), 0):
        has_P = sides[0].lengths_B + position >= 0
        ids, others = (tokens.ids_BxT[has_P, (tokens.lengths_B + position)[has_P]] for tokens in sides)
        ((token, count),) = collections.Counter(ids.tolist()).most_common(1)
        columns.append(
            TokenColumn(
                position=position,
                prompts=int(has_P.sum()),
                token=text(token),
                share=count / int(has_P.sum()),
                differs=float((ids != others).mean()),
            )
        )
    return tuple(columns)


def group_lengths(
    point: SplitPoint, params: decoder.Params, lengths_P: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """``groups_by_length`` of pairs of so many tokens, whose recorded runs take at most ``GROUP_BYTES`` a group."""
    return groups_by_length(lengths_P, STEP, GROUP_BYTES // _token_bytes(point, params))


def filled_rows(batch_rows: int) -> int:
    """Rows of a batch of patched nodes or paths, with those that fill it up."""
    return -(-batch_rows // STEP) * STEP


def group_pairs(model: LanguageModel, point: SplitPoint, prompts: Sequence[Prompt]) -> list[Pairs]:
    """The pairs sorted by length, in groups whose recorded runs take at most ``GROUP_BYTES`` each."""
    sides = [model.tokenize([getattr(prompt, side) for prompt in prompts]) for side in ("text", "counterpart")]
    lengths_P, others_P = (tokens.lengths_B for tokens in sides)
    if (lengths_P != others_P).any():
        raise ValueError("a prompt and its counterpart have different numbers of tokens")
    answers_Px2 = first_answer_ids(model.tokenizer, prompts)
    groups = []
    for index_Q, rows_B, length in group_lengths(point, model.params, lengths_P):
        ids_2xBxT = np.zeros((2, len(rows_B), length), np.int32)
        for ids_BxT, tokens in zip(ids_2xBxT, sides, strict=True):
            kept = min(length, tokens.ids_BxT.shape[1])
            ids_BxT[:, :kept] = tokens.ids_BxT[rows_B, :kept]
        groups.append(Pairs(index_Q, ids_2xBxT, sides[0].last_B[rows_B], answers_Px2[rows_B]))
    return groups


def few_pairs(model: LanguageModel, prompts: Sequence[Prompt]) -> Iterator[Pairs]:
    """The pairs sorted by length, a few at a time."""
    site = Site("resid_pre", 0)
    for pairs in group_pairs(model, SplitPoint(model.config, site, site, model.mesh), prompts):
        for first in range(0, len(pairs.index_P), FEW):
            own = slice(first, first + FEW)
            yield Pairs(pairs.index_P[own], pairs.ids_2xBxT[:, own], pairs.last_B[own], pairs.answers_Bx2[own])


def _token_bytes(point: SplitPoint, params: decoder.Params) -> int:
    """What a token of a recorded run takes."""
    config = point.config
    streams = (config.n_layers + 1) * (1 if point.in_stream else 2) * config.d_model
    return (streams + 2 * config.n_layers * config.n_kv_heads * config.d_head) * params["embed_VxD"].dtype.itemsize


def measure_rows(
    started: Iterable[tuple[np.ndarray, np.ndarray, jax.Array]],
    shape: tuple[int, int],
    total: int,
    what: str,
    on_progress: OnProgress,
) -> np.ndarray:
    """The logit differences of rows that are started in batches, float64 of this shape; NaN where there is no row.

    Args:
      started: of each batch the places of its rows in both axes, and their logit differences, filled up.
      shape: entries and prompts.
      total: rows.
      what: is patched, for the error.
      on_progress: called at the start and after each batch with the rows done and of all; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    diff_ExP, done = np.full(shape, np.nan), 0
    on_progress(done, total)
    for entry_S, index_S, diff_R in prefetch(started):
        diff_S = to_host(diff_R)[: len(entry_S)]
        if not np.isfinite(diff_S).all():
            raise UserError(f"a logit difference with {what} patched is not finite: try --model.dtype=float32")
        diff_ExP[entry_S, index_S] = diff_S
        done += len(entry_S)
        on_progress(done, total)
    return diff_ExP


def patched_differences(
    split: SplitModel,
    base: Sequence[CleanRun],
    source: Sequence[CleanRun],
    patched: Callable[[CleanRun, CleanRun, slice], jax.Array],
) -> np.ndarray:
    """The logit difference of each base prompt with something of the source put in, float64 [P].

    Args:
      base, source: runs of the prompts and of others of as many tokens, row by row.
      patched: gives those of some rows of a run and of the other one.

    Raises:
      UserError: one is not finite.
    """
    found = [
        np.concatenate([np.asarray(patched(own, other, some), np.float64) for some in slices(own)])
        for own, other in zip(base, source, strict=True)
    ]
    diff_P = in_order(found, base)
    if not np.isfinite(diff_P).all():
        raise UserError(
            f"a logit difference after patching {split.point.site} is not finite: try --model.dtype=float32"
        )
    return diff_P
