"""A language model split at a dictionary's site, and clean runs of prompts up to it."""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, rescale
from saejax.errors import UserError, one_of
from saejax.interventions.several_sites import SeveralSites
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.sites import ALL_KINDS, Site
from saejax.models.split import PrefixKV, Readout, SplitPoint
from saejax.models.tokens import Tokens
from saejax.parallel.mesh import by_row, document_devices, row_sharding, sharding
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

PROMPTS = 16  # prompts of one program, at most
ROW_STEP = 8  # prompts are filled up with copies to a multiple of this, or of the devices where these are more
PROGRAM_TOKENS = 2048  # and its tokens, unless a single prompt has more
LENGTH_STEP = 2  # prompts are padded to a multiple of this many tokens
GROUP_TOKENS = 8192  # maximum number of tokens, padding included, whose clean run is kept at once
KEPT_BYTES = 2**28  # maximum memory of keys and values that are kept with a clean run
SHORT = 64  # tokens up to which all prompts are padded to one length: a program takes longer than the padding


class SiteRows(NamedTuple):
    """Inputs of the layers above the site on B prompts; fields as in ``CleanRun``."""

    stream_BxTxX: jax.Array
    value_BxTxD: jax.Array
    read_BxTxD: jax.Array
    domain_BxT: jax.Array
    last_B: jax.Array
    answers_Bx2: jax.Array


@dataclasses.dataclass(frozen=True)
class CleanRun:
    """Prompts run without an edit; B is a multiple of ``row_step`` of their padded length."""

    #: the prompts' indices in the list they came from; the first P of the B rows, the rest are copies.
    index_P: np.ndarray
    #: stream_BxTxX, value_BxTxD, read_BxTxD: the stream entering the layers above, the site's value, and the value that
    #: the dictionary reads.
    stream_BxTxX: jax.Array
    value_BxTxD: jax.Array
    read_BxTxD: jax.Array
    domain_BxT: jax.Array  #: True at editable positions: positions that were asked for and are no attention sinks
    #: a number for each text from the first token to this one; prompts that begin alike share it.
    prefix_PxT: np.ndarray
    last_B: np.ndarray  #: index of each prompt's last token, int32
    answers_Bx2: np.ndarray  #: token ids of the correct and the wrong answer, int32
    counterpart: "CleanRun | None" = None  #: the prompts' counterparts, row by row, if they were run
    #: results of ``SplitModel.past``, which the dictionaries of a site share
    kept: dict[SplitPoint, tuple[jax.Array, PrefixKV]] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )


class SplitModel:
    """A language model split at the site that a dictionary's features write to.

    Args:
      dictionary: an SAE, a transcoder, features of several sites, or another basis of directions
        (``saejax.interventions.bases``).
      positions: the editable positions; see ``editable_positions``.
      error: "keep", or "drop": the clean run, too, goes through the dictionary, without the reconstruction error.
      readout: what is measured in place of the logit difference, if it is not that.

    Attributes:
      lm: the model before it is split.
      point: where the model is split (static).
      params: parameters of the decoder.
      dictionary: in output units (``rescale.to_output_units``); its features are split over the mesh's axis ``model``.

    Raises:
      UserError: the dictionary belongs to another model, or its sites do not exist there.
    """

    def __init__(
        self,
        model: LanguageModel,
        dictionary: Dictionary,
        positions: str = "all",
        error: str = "keep",
        readout: Readout | None = None,
    ):
        one_of(error, ("keep", "drop"), "error")
        parse_positions(positions)
        parts = dictionary.parts if isinstance(dictionary, SeveralSites) else [dictionary.config]
        for part in parts:
            site = Site.parse(part.site).check(model.config)
            target = Site.parse(part.target or part.site).check(model.config)
            for verb, place, width in (("reads", site, part.d_in), ("writes", target, part.d_out)):
                if width != place.width(model.config):
                    expected = place.width(model.config)
                    raise UserError(f"the dictionary {verb} {width} dimensions, but {place} has {expected}")
            part.check_model(model.source.name, model.source.fingerprint)
        reads = Site.parse(dictionary.site)
        writes = Site.parse(dictionary.config.target or dictionary.site).check(model.config)
        order = [ALL_KINDS.index(site.kind) for site in (reads, writes)]
        if writes != reads and (writes.layer != reads.layer or order[0] > order[1]):
            raise UserError(
                f"the dictionary is a transcoder from {reads} to {writes}: expected one to a later site of the layer "
                "that it reads"
            )
        # Dictionaries without a rule for attention sinks take the model's.
        dictionary = dictionary.with_sink_norms(model.sink_norm)
        # Changes at the site are computed as activations times decoder rows.
        dictionary = rescale.to_output_units(dictionary)
        later = dictionary.later_sites if isinstance(dictionary, SeveralSites) else ()
        self.point = SplitPoint(model.config, writes, reads, model.mesh, readout=readout, later=later)
        self._least_tokens = self.point.least_tokens()
        self.params = model.params
        self.dictionary = dictionary.on_mesh(model.mesh)
        self.lm, self._positions, self.error = model, positions, error

    @property
    def objective(self) -> str:
        """The readout whose drop is an effect: ``logit_diff``, or ``readout`` if it is the user's."""
        return "readout" if self.point.readout else "logit_diff"

    def reads_like(self, other: "SplitModel") -> bool:
        """Return whether clean runs of the same prompts are the same, whatever the features of the dictionaries."""
        sinks = [
            (config.max_norm, config.target_max_norm) for config in (self.dictionary.config, other.dictionary.config)
        ]
        # Without the error term a clean run goes through the dictionary.
        errors_kept = self.error == other.error == "keep"
        return errors_kept and sinks[0] == sinks[1] and (self.point, self._positions) == (other.point, other._positions)

    def with_dictionary(self, dictionary: Dictionary) -> "SplitModel":
        """Return the model split at the site of another dictionary."""
        return SplitModel(self.lm, dictionary, self._positions, self.error, self.point.readout)

    def with_readout(self, readout: Readout) -> Self:
        """Return the model with another readout and the same clean runs."""
        split = copy.copy(self)
        split.point = dataclasses.replace(self.point, readout=readout)
        split._least_tokens = split.point.least_tokens()
        return split

    def tokenize(self, prompts: Sequence[Prompt]) -> Tokens:
        """Return the token ids of prompts; raise a ``UserError`` if one is too short for the readout."""
        tokens = self.lm.tokenize([prompt.text for prompt in prompts])
        positions, least_tokens = self.point.positions, self._least_tokens
        for place in np.flatnonzero(tokens.lengths_B < least_tokens)[:1]:
            takes = f"the logits at {positions} positions"
            if tokens.lengths_B[place] >= positions:
                takes = f"the attention to one of {least_tokens} tokens"
            raise UserError(
                f"a readout takes {takes}, and the prompt {prompts[place].text!r} has {tokens.lengths_B[place]} "
                "tokens: give longer prompts"
            )
        return tokens

    def run(self, prompts: Sequence[Prompt], counterparts: bool = False, least: int = 0) -> list[CleanRun]:
        """Run prompts without an edit, sorted by length, in groups of at most ``GROUP_TOKENS`` tokens.

        Args:
          prompts: the prompts.
          counterparts: whether their counterparts are run, too.
          least: tokens to which shorter ones are padded, like other prompts that share their programs.

        Raises:
          UserError: a prompt is too long, or too short for the readout; an answer has no token of its own; the site's
            value is not finite; or a counterpart is asked for that does not exist, or has another number of tokens.
        """
        if counterparts:
            pairs = zip(self.run(prompts, least=least), self.run(self._swap_sides(prompts), least=least), strict=True)
            return [dataclasses.replace(run, counterpart=counterpart) for run, counterpart in pairs]
        tokens = self.tokenize(prompts)
        answers_Nx2 = np.zeros((len(prompts), 2), np.int32)
        # Of a readout of the user's, prompts may be without answers.
        if not self.point.readout or any(prompt.correct or prompt.wrong for prompt in prompts):
            answers_Nx2 = first_answer_ids(self.lm, prompts)
        runs = []
        lengths_N = np.maximum(tokens.lengths_B, least)
        step_of = functools.partial(row_step, devices=document_devices(self.point.mesh))
        for index_P, rows_B, length in groups_by_length(lengths_N, step_of, GROUP_TOKENS):
            ids_BxT, last_B = fit_ids(tokens.ids_BxT[rows_B], length), tokens.last_B[rows_B]
            wanted_BxT = editable_positions(self._positions, last_B, length)
            texts = [prompts[index].text for index in rows_B]
            stream, value, read, domain = self._run_head(ids_BxT, last_B, wanted_BxT, texts)
            prefix_PxT = prefixes((2 * ids_BxT + wanted_BxT)[: len(index_P)])  # editable positions are part of it
            runs.append(CleanRun(index_P, stream, value, read, domain, prefix_PxT, last_B, answers_Nx2[rows_B]))
        if not any(np.asarray(run.domain_BxT).any() for run in runs):
            logging.warning(
                "edits change nothing, with the positions %r: in each of these %d prompts they are attention sinks at "
                "%s, which edits of features leave alone, or there are none",
                self._positions,
                len(prompts),
                self.point.reads,
            )
        return runs

    def _swap_sides(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the counterparts as prompts, with the prompts' answers."""
        for prompt in prompts:
            if not prompt.counterpart:
                raise UserError(
                    f"{prompt.behaviour}, prompt {prompt.text!r}, has no counterpart: give it one in --task.prompts, "
                    "or use another --ablate.replacement"
                )
        texts = [prompt.text for prompt in prompts], [prompt.counterpart for prompt in prompts]
        lengths, counterpart_lengths = (self.lm.tokenize(side).lengths_B for side in texts)
        for row in np.flatnonzero(lengths != counterpart_lengths)[:1]:
            raise UserError(
                f"{prompts[row].behaviour}: {prompts[row].text!r} has {lengths[row]} tokens and its counterpart "
                f"{prompts[row].counterpart!r} {counterpart_lengths[row]}: --ablate.replacement=counterpart takes "
                "pairs of one length"
            )
        return [dataclasses.replace(prompt, text=prompt.counterpart) for prompt in prompts]

    def common_length(self, prompts: Sequence[Prompt]) -> int:
        """Return the tokens to which short prompts are padded together; 0 if there are long ones."""
        longest = int(self.lm.tokenize([prompt.text for prompt in prompts]).lengths_B.max())
        return longest if longest <= SHORT else 0

    def slices(self, run: CleanRun) -> Iterator[tuple[slice, SiteRows]]:
        """Yield the rows of a run, a program's at a time: which they are, and their arrays by ``by_row``."""
        size = rows_at_once(len(run.last_B), run.domain_BxT.shape[1], document_devices(self.point.mesh))
        for first in range(0, len(run.last_B), size):
            part = slice(first, first + size)
            yield part, SiteRows(*self.by_row(*(getattr(run, name)[part] for name in SiteRows._fields)))

    def past(self, run: CleanRun) -> tuple[jax.Array, PrefixKV]:
        """Return the stream leaving the last layer at each prompt's end [B, D], and keys and values above the site."""
        if self.point in run.kept:
            return run.kept[self.point]
        parts = [
            record(self.point, self.params, rows.stream_BxTxX, rows.value_BxTxD, rows.last_B)
            for _, rows in self.slices(run)
        ]
        past = parts[0]
        if len(parts) > 1:
            ends, pasts = zip(*parts, strict=True)
            past = jnp.concatenate(ends), jax.tree.map(lambda *p: jnp.concatenate(p, axis=1), *pasts)
        # Keys and values of long prompts would take gigabytes.
        if sum(array.nbytes for array in jax.tree.leaves(past)) <= KEPT_BYTES:
            run.kept[self.point] = past
        return past

    def _run_head(
        self, ids_BxT: np.ndarray, last_B: np.ndarray, wanted_BxT: np.ndarray, texts: Sequence[str]
    ) -> list[jax.Array]:
        """Return the arrays of a ``CleanRun`` that devices compute, a few prompts at a time."""
        parts, size = [], rows_at_once(len(ids_BxT), ids_BxT.shape[1], document_devices(self.point.mesh))
        for first in range(0, len(ids_BxT), size):
            batch = slice(first, first + size)
            rows = self.by_row(ids_BxT[batch], last_B[batch], wanted_BxT[batch])
            *part, finite_P = run_head(self.point, self.error, self.params, self.dictionary, *rows)
            for row in np.flatnonzero(~np.asarray(finite_P))[:1]:
                raise UserError(
                    f"the value of {self.point.site} is not finite in the prompt {texts[first + row]!r}: the "
                    "model's weights hold NaN or it overflows; try --model.dtype=float32 or another model"
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else [jnp.concatenate(part) for part in zip(*parts, strict=True)]

    def by_row(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Put arrays on the devices, their rows split over ``member`` and ``data`` where these divide them."""
        return by_row(self.point.mesh, *arrays)


def fit_ids(ids_BxT: np.ndarray, length: int) -> np.ndarray:
    """Return token ids cut or padded to a length."""
    return np.pad(ids_BxT[:, :length], ((0, 0), (0, max(length - ids_BxT.shape[1], 0))))


def editable_positions(positions: str, last_B: np.ndarray, length: int) -> np.ndarray:
    """Return True at the named positions of prompts, bool [B, T].

    Args:
      positions: "all"; "last", each prompt's last token; or a slice of its tokens as in Python, such as "1:4" or "-3:".
      last_B: the index of each prompt's last token.
      length: T.

    Raises:
      UserError: ``positions`` is none of these.
    """
    start, stop = parse_positions(positions)
    ends_Bx1, position_1xT = last_B[:, None] + 1, np.arange(length)[None, :]

    def bound(value: int | None, default: np.ndarray) -> np.ndarray:
        return default if value is None else np.clip(value + (value < 0) * ends_Bx1, 0, ends_Bx1)

    return (position_1xT >= bound(start, 0 * ends_Bx1)) & (position_1xT < bound(stop, ends_Bx1))


def parse_positions(positions: str) -> tuple[int | None, int | None]:
    """Return the slice (start, stop) that a text such as ``1:4`` means, None for an open end."""
    if positions in ("all", "last"):
        return (None, None) if positions == "all" else (-1, None)
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", positions):
        raise UserError(f"there are no positions {positions!r}: expected all, last, or a slice such as 1:4 or -3:")
    start, stop = (int(bound) if bound else None for bound in positions.split(":"))
    # Both counted from the same end: the slice is empty in every prompt.
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise UserError(f"there are no positions in {positions!r}: expected a slice that begins before its end")
    return start, stop


def in_order(parts: Iterable[np.ndarray], runs: Sequence[CleanRun]) -> np.ndarray:
    """Return the rows of some runs, without padding, in the order of the prompts, [P, ...]."""
    rows = np.concatenate([np.asarray(part)[: len(run.index_P)] for part, run in zip(parts, runs, strict=True)])
    return rows[np.argsort(np.concatenate([run.index_P for run in runs]))]


def prompts_at_once(length: int, devices: int = 1) -> int:
    """Return how many prompts of a padded length one program takes: a power of two, fewer of long prompts.

    On several devices it is the next multiple of these, or each would run all of the prompts.
    """
    # All features at all tokens of 16 long prompts would take many gigabytes, and few prompts be filled up to 16.
    fitting = max(PROGRAM_TOKENS // max(length, 1), 1)
    prompts = min(PROMPTS, 1 << fitting.bit_length() - 1)
    return prompts + -prompts % devices


def row_step(length: int, devices: int = 1, most: int = 2 * GROUP_TOKENS) -> int:
    """Return the number of which the rows of a clean run are a multiple, given a padded length and the devices.

    Prompts are filled up to a row for each device if these have at most ``most`` tokens together.
    """
    few = math.lcm(ROW_STEP, devices)
    step = min(prompts_at_once(length, devices), few)
    # Every device holds a whole group: copies of long prompts, a row for each device, would take gigabytes of each.
    return step if step * length <= most else min(prompts_at_once(length), few)


def rows_at_once(rows: int, length: int, devices: int = 1) -> int:
    """Return how many of the ``rows`` of a clean run, of a padded ``length``, one program takes: a divisor of all.

    A multiple of the ``devices`` over which they are split, where that divides all rows.
    """
    size = math.gcd(rows, prompts_at_once(length, devices))
    return size if size % devices == 0 else math.gcd(rows, prompts_at_once(length))


def groups_by_length(
    lengths_N: np.ndarray, step_of: Callable[[int], int], most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield groups of prompts of similar length, of at most ``most`` tokens with padding, or of one step of prompts.

    Args:
      lengths_N: tokens of each prompt.
      step_of: a padded length -> what the rows of a group of this length are a multiple of.
      most: tokens of a group.

    Yields:
      The indices of the group's prompts [P], of its rows [B] with copies that pad it, and the tokens of a row.
    """
    left = np.argsort(lengths_N, kind="stable")
    while len(left):
        # Sorted, so the last prompt of a group sets its length, and the memory of the first so many is known.
        length_M = -(-lengths_N[left] // LENGTH_STEP) * LENGTH_STEP
        step_M = np.array([step_of(int(length)) for length in length_M])
        rows_M = -(-np.arange(1, len(left) + 1) // step_M) * step_M
        fits_M = np.append(rows_M * length_M <= most, False)
        # Where not even one step fits, as many of the shortest prompts as a step has.
        count = int(np.argmin(fits_M)) or int(np.sum(rows_M == step_M))
        index_P, left = left[:count], left[count:]
        yield index_P, np.resize(index_P, rows_M[count - 1]), int(length_M[count - 1])


def prefixes(ids_PxT: np.ndarray) -> np.ndarray:
    """Return a number for each prefix of each prompt, [P, T]; the same in all prompts that begin with it."""
    prefix_PxT, before_P = np.zeros(ids_PxT.shape, np.int64), np.zeros(len(ids_PxT), np.int64)
    for t, ids_P in enumerate(ids_PxT.T):
        pairs_Px2 = np.stack([before_P, ids_P], axis=1)
        # Numbered token by token: a prefix is its predecessor's number and one more token, not a list to compare.
        before_P = np.unique(pairs_Px2, axis=0, return_inverse=True)[1].reshape(-1)
        prefix_PxT[:, t] = before_P
    return prefix_PxT


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_head(
    point: SplitPoint,
    error: str,
    params: decoder.Params,
    dictionary: Dictionary,
    ids_BxT: jax.Array,
    last_B: jax.Array,
    wanted_BxT: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return stream, value and what is read [B, T, D], where features are editable [B, T], which rows are finite [B].

    Args:
      point: where the model is split (static).
      error: as for ``SplitModel`` (static).
      params: parameters of the decoder.
      dictionary: the dictionary that reads the site.
      ids_BxT: token ids.
      last_B: index of each prompt's last token.
      wanted_BxT: positions that were asked for.
    """
    stream_BxTxX, value_BxTxO, read_BxTxD = point.run_prefix(params, ids_BxT)
    real_BxT = jnp.arange(value_BxTxO.shape[1])[None, :] <= last_B[:, None]
    # Padding has values, too, which no prompt sees: nothing is edited or counted there.
    domain_BxT = real_BxT & dictionary.is_not_sink(read_BxTxD, value_BxTxO)
    finite_BxT = jnp.isfinite(value_BxTxO).all(axis=-1) & jnp.isfinite(read_BxTxD).all(axis=-1)
    if error == "drop":
        rebuilt_BxTxO = dictionary.decode(dictionary.encode(read_BxTxD), read_BxTxD).astype(value_BxTxO.dtype)
        # Sinks keep their values: dictionaries were not trained to rebuild them.
        value_BxTxO = jnp.where(domain_BxT[..., None], rebuilt_BxTxO, value_BxTxO)
    outputs = stream_BxTxX, value_BxTxO, read_BxTxD, domain_BxT & wanted_BxT, (finite_BxT | ~real_BxT).all(axis=-1)
    return jax.lax.with_sharding_constraint(outputs, sharding(point.mesh))  # edited rows pick theirs from all of these


@functools.partial(jax.jit, static_argnums=0)
def record(
    point: SplitPoint, params: decoder.Params, stream_BxTxX: jax.Array, value_BxTxD: jax.Array, last_B: jax.Array
) -> tuple[jax.Array, PrefixKV]:
    """Return what ``SplitModel.past`` does, of arrays as ``CleanRun`` has them."""
    x, past = point.run_suffix_with_kv(params, stream_BxTxX, value_BxTxD)
    last = jnp.take_along_axis(x, last_B[:, None, None], axis=1)[:, 0]
    return jax.lax.with_sharding_constraint((last, past), (sharding(point.mesh), past.placements(point.mesh)))


def of_features(mesh: Mesh, dictionary: Dictionary, arrays: Sequence[jax.Array], use: Callable) -> Any:
    """Map ``use(f_PxTxF, *rest)`` over a few prompts at a time: all features of all would take gigabytes.

    Args:
      mesh: the devices, each of which encodes some of the prompts.
      dictionary: the dictionary of the features.
      arrays: what is read [B, T, D], editable positions [B, T], and others with B rows, given to ``use`` P at a time.
      use: returns arrays with P rows.
    """
    size = rows_at_once(len(arrays[0]), arrays[0].shape[1], document_devices(mesh))
    chunks = [array.reshape(-1, size, *array.shape[1:]) for array in arrays]

    def use_chunk(chunk: Sequence[jax.Array]) -> Any:
        # Clean runs are whole on every device, each of which would encode all prompts.
        split = [jax.lax.with_sharding_constraint(array, row_sharding(mesh, array.shape)) for array in chunk]
        return use(active_features(dictionary, *split[:2]), *split[2:])

    mapped = jax.lax.map(use_chunk, chunks)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), mapped)


@jax.jit
def active_features(dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    """Return feature activations [B, T, F] of what is read; 0 where ``domain_BxT`` is False."""
    f_BxTxF = dictionary.encode(read_BxTxD)
    return jnp.where(domain_BxT[:, :, None], f_BxTxF, jnp.zeros_like(f_BxTxF))


def not_finite(point: SplitPoint, where: str) -> str:
    """Return what to say where what is measured, or its gradient, is not finite."""
    if point.readout is not None:
        return f"the readout, or its gradient, is not finite {where}: it has to be finite for all logits that it gets"
    return (
        f"the logit difference, or its gradient, is not finite {where}: the model or the dictionary holds NaN or "
        "overflows; try --model.dtype=float32, or train the dictionary again"
    )
