"""Activation patching between prompts and their counterparts: at sites, positions, heads and features.

A prompt and its counterpart have equally many tokens, and the prompt's wrong answer is right for the counterpart. A
value of the *base* run is replaced by the *source* run's (Vig et al., 2020; Geiger et al., 2021), and the logit
difference of the prompt's answers is read:

- *denoising*: base counterpart, source prompt: is this value sufficient to bring the answer back?
- *noising*: base prompt, source counterpart: is it necessary for the answer?

(Heimersheim and Nanda, 2024, arXiv 2404.15255.) One *row* of work is one direction, layer, head, position and pair:

1. Both runs are recorded once: the stream entering each layer, and the site's value in each layer.
2. A row whose values are equal in both runs, to the last bit, is not run: its effect is exactly 0.
3. The other rows run in batches, sorted by layer, from the base run's stream entering the lowest layer of the batch.
   One program serves all layers, positions and heads.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.arguments import as_numbers
from saejax.errors import UserError, one_of
from saejax.interventions.answers import CausalVerdict, mean_interval
from saejax.interventions.columns import Columns
from saejax.interventions.engine import BATCH_ROWS, prefetch
from saejax.interventions.published_heads import PublishedHead
from saejax.interventions.split_model import (
    GROUP_TOKENS,
    editable_positions,
    fit_ids,
    groups_by_length,
    parse_positions,
    row_step,
)
from saejax.models import decoder
from saejax.models.config import DecoderConfig, TorchConfig
from saejax.models.decoder import run_layers
from saejax.models.language_model import LanguageModel
from saejax.models.layers import Taps
from saejax.models.sites import ALL_KINDS, HEAD_KINDS, INNER_KINDS, Site
from saejax.models.split import SplitPoint
from saejax.models.tokens import Tokens, token_text
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row, document_devices, sharding
from saejax.progress import OnProgress, silent
from saejax.results import Interval
from saejax.short_reprs import has_short_repr
from saejax.tasks.answer_tokens import different_answer_ids
from saejax.tasks.behaviours import Prompt

DIRECTIONS = ("denoising", "noising")
EACH = "each"  # positions: every one by itself
GROUP_BYTES = 2**28  # maximum memory of the recorded runs of a group of pairs, unless a few pairs need more


@has_short_repr
@dataclasses.dataclass(frozen=True)
class PatchEffects:
    """Logit differences of P pairs with a kind of site patched. The first axis of arrays counts ``DIRECTIONS``."""

    kind: str  #: kind of site
    layers: tuple[int, ...]  #: the L patched layers
    positions: str  #: ``each``, or the positions that were patched together
    clean_P: np.ndarray  #: float64, logit difference of the prompts
    corrupted_P: np.ndarray  #: float64, their counterparts' logit difference
    #: float64, logit difference after the patch. H is the number of heads, 1 at other sites. With ``each``, C counts
    #: positions, aligned at the end: the last column is the last token of every prompt; NaN where a prompt has no such
    #: position. Otherwise C is 1.
    diff_DxLxHxPxC: np.ndarray

    @property
    def effect_DxLxHxPxC(self) -> np.ndarray:
        """Logits that denoising restores (patched - corrupted) and that noising removes (clean - patched)."""
        denoised, noised = self.diff_DxLxHxPxC
        return np.stack([denoised - self.corrupted_P[:, None], self.clean_P[:, None] - noised])


class PatchRows(NamedTuple):
    """R rows: layer, head, index of the pair in its group, and the first patched position and the one after the last.

    Each is int32 [R].
    """

    layer_R: np.ndarray
    head_R: np.ndarray
    place_R: np.ndarray
    first_R: np.ndarray
    stop_R: np.ndarray


class Recording(NamedTuple):
    """B prompts without a patch: logit differences, streams entering the layers, and values of the site's kind."""

    diff_B: jax.Array
    stream_LxBxTxD: jax.Array
    value_LxBxTxX: jax.Array


def fitting_pairs(
    lm: LanguageModel, prompts: Sequence[Prompt], split: str = "test"
) -> tuple[list[Prompt], dict[str, int]]:
    """Return the prompts of a split with a counterpart of as many tokens, and the number of others by reason.

    The text itself is no counterpart.
    """
    chosen = [prompt for prompt in prompts if prompt.split == split]
    paired = [prompt for prompt in chosen if prompt.counterpart not in ("", prompt.text)]
    fitting: list[Prompt] = []
    if paired:
        clean, corrupted = _tokenize(lm, paired)
        same_P = clean.lengths_B == corrupted.lengths_B
        fitting = [prompt for prompt, same in zip(paired, same_P, strict=True) if same]
    return fitting, {"no counterpart": len(chosen) - len(paired), "other length": len(paired) - len(fitting)}


def patch_sites(
    lm: LanguageModel,
    kind: str,
    prompts: Sequence[Prompt],
    positions: str = EACH,
    layers: Sequence[int] | None = None,
    batch_rows: int = BATCH_ROWS,
    on_progress: OnProgress = silent,
    by_head: bool = True,
) -> PatchEffects:
    """Patch a kind of site in every layer, in both directions.

    Args:
      lm: the model.
      kind: a kind of site; of ``attn_q``, ``attn_k``, ``attn_v`` and ``attn_z`` every head by itself.
      prompts: P prompts with counterparts of as many tokens.
      positions: ``each``, or positions that are patched together: all, last, or a slice such as 1:4 or -3:.
      layers: the layers; None: all.
      batch_rows: rows of a batch.
      on_progress: called at the start and after each batch with the rows done and in total, also those that are not
        run; may raise to stop.
      by_head: whether heads are patched each by itself, not all together.

    Raises:
      UserError: there is no such kind or layer, the model runs in PyTorch and the kind is one of heads, a counterpart
        has another number of tokens, both answers of a prompt begin with the same token, or a logit difference is not
        finite.
    """
    one_of(kind, ALL_KINDS, "kind of site")
    numbers = as_numbers(range(lm.config.n_layers) if layers is None else layers, whole=True)
    if numbers is None or numbers.ndim != 1:
        raise UserError(f"layers is {layers!r:.60}: expected layers, such as [20], or None for all")
    layers = tuple(sorted(set(numbers.tolist())))
    for layer in layers:
        Site(kind, layer).check(lm.config)
    if positions != EACH:
        parse_positions(positions)
    point = SplitPoint(lm.config, Site(kind, 0), Site(kind, 0), lm.mesh)
    sides = _tokenize(lm, prompts)
    lengths_P = sides[0].lengths_B
    for index in np.flatnonzero(lengths_P != sides[1].lengths_B)[:1]:
        raise UserError(
            f"{prompts[index].text!r} has another number of tokens than its counterpart "
            f"{prompts[index].counterpart!r}: give pairs of one length (see fitting_pairs)"
        )
    answers_Px2 = different_answer_ids(lm, prompts)
    columns = int(lengths_P.max()) if positions == EACH else 1
    heads = count_heads(lm.config, kind) if by_head else 1
    base_2xP = np.full((2, len(prompts)), np.nan)
    diff_DxLxHxPxC = np.full((2, len(layers), heads, len(prompts), columns), np.nan)
    all_rows = 2 * diff_DxLxHxPxC[0, :, :, 0, 0].size * int(lengths_P.sum() if positions == EACH else len(prompts))
    done = 0
    on_progress(0, all_rows)
    # Bytes that one token takes in the recorded runs of a pair.
    token_bytes = 2 * 4 * lm.config.n_layers * (lm.config.d_model + point.site.width(lm.config))
    # Recorded in every layer, a row for each device would take gigabytes sooner than in clean runs.
    step_of = functools.partial(row_step, devices=document_devices(lm.mesh), most=GROUP_TOKENS)
    for index_P, rows_B, length in groups_by_length(lengths_P, step_of, GROUP_BYTES // token_bytes):
        last_B, answers_Bx2 = sides[0].last_B[rows_B], answers_Px2[rows_B]
        all_ids = [fit_ids(tokens.ids_BxT[rows_B], length) for tokens in sides]
        runs = [record(point, lm.params, *by_row(lm.mesh, ids_BxT, last_B, answers_Bx2)) for ids_BxT in all_ids]
        base_2xP[:, index_P] = [to_host(run.diff_B)[: len(index_P)] for run in runs]
        patched, column_R = _rows_to_run(heads, runs, positions, layers, last_B[: len(index_P)], length)
        has_column_PxC = np.ones((len(index_P), columns), bool)
        if positions == EACH:
            # Columns are counted from the end, where prompts of other lengths have their answers.
            column_R = column_R + columns - lengths_P[index_P][patched.place_R]
            has_column_PxC = np.arange(columns)[None, :] >= columns - lengths_P[index_P][:, None]
        places = (np.searchsorted(layers, patched.layer_R), patched.head_R, index_P[patched.place_R], column_R)
        every, is_torch = np.arange(len(column_R)), isinstance(lm.config, TorchConfig)
        # In PyTorch a batch's rows have the same layer, from which it is run.
        groups = np.split(every, np.flatnonzero(np.diff(patched.layer_R)) + 1) if is_torch else [every]
        batches = [group[first : first + batch_rows] for group in groups for first in range(0, len(group), batch_rows)]
        for direction, base in enumerate((1, 0)):
            # A row that is not run changes nothing.
            whole_PxC = np.where(has_column_PxC, base_2xP[base, index_P][:, None], np.nan)
            diff_DxLxHxPxC[direction][:, :, index_P] = whole_PxC
            # The run that is not the base is the source.
            args = point, heads, lm.params, runs[base], runs[1 - base].value_LxBxTxX, last_B, answers_Bx2
            # A generator: a batch is started when an earlier one is fetched, not all at once.
            started = (_start_rows(*args, PatchRows(*(a[b] for a in patched)), batch_rows) for b in batches)
            for batch, device_array in zip(batches, prefetch(started), strict=True):
                values_R = to_host(device_array)[: len(batch)]
                if not np.isfinite(values_R).all():
                    raise UserError(f"a logit difference with {kind} patched is not finite: try --model.dtype=float32")
                diff_DxLxHxPxC[direction][tuple(array[batch] for array in places)] = values_R
                done += len(batch)
                on_progress(done, all_rows)
    return PatchEffects(kind, layers, positions, base_2xP[0], base_2xP[1], diff_DxLxHxPxC)


def count_heads(config: DecoderConfig, kind: str) -> int:
    """Return the number of heads of a kind of site; 1 for sites of the whole stream."""
    if kind not in HEAD_KINDS:
        return 1
    return config.n_heads if kind in ("attn_q", "attn_z") else config.n_kv_heads


@functools.partial(jax.jit, static_argnums=0)
def record(
    point: SplitPoint, params: decoder.Params, ids_BxT: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
) -> Recording:
    """Run prompts without a patch.

    Args:
      point: a site of the kind, in any layer (static).
      params: parameters of the decoder.
      ids_BxT: token ids.
      last_B: index of each prompt's last token.
      answers_Bx2: token ids of the correct and the wrong answer.
    """
    config, kind = point.config, point.site.kind
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    output = run_layers(
        config, params, x_BxTxD, 0, config.n_layers, Taps(collect={"resid_pre", kind}), rules=point.rules
    )
    diff_B = point.logit_difference(params, output.x, last_B, answers_Bx2)
    # The streams entering layers are kept, so that rows start at their layer instead of at the first.
    recorded = Recording(diff_B, output.collected["resid_pre"], output.collected[kind])
    return jax.lax.with_sharding_constraint(recorded, sharding(point.mesh))  # rows pick theirs from all pairs


def _patched_rows(
    point: SplitPoint,
    heads: int,
    start: int | jax.Array,
    params: decoder.Params,
    stream_LxBxTxD: jax.Array,
    source_LxBxTxX: jax.Array,
    rows: PatchRows,
    last_R: jax.Array,
    answers_Rx2: jax.Array,
) -> jax.Array:
    """Return the logit difference of each row, [R], run from the layer ``start`` on.

    ``start`` is an integer for models that run in PyTorch, whose rows all have this layer. Streams are those of the
    base run, values of the source run.
    """
    position_1xT = jnp.arange(stream_LxBxTxD.shape[2])[None, :]
    at_RxT = (position_1xT >= rows.first_R[:, None]) & (position_1xT < rows.stop_R[:, None])
    source_RxTxX = source_LxBxTxX[rows.layer_R, rows.place_R]
    head_1xX = jnp.repeat(jnp.arange(heads), source_RxTxX.shape[-1] // heads)[None, :]
    here_RxTxX = at_RxT[..., None] & (head_1xX == rows.head_R[:, None])[:, None]

    def put(kind: str, layer: int | jax.Array, value_RxTxX: jax.Array) -> jax.Array:
        if kind != point.site.kind:
            return value_RxTxX
        # The layer is data, not a constant of the program: one program serves all layers.
        in_layer_R = rows.layer_R == layer
        return jnp.where(here_RxTxX & in_layer_R[:, None, None], source_RxTxX, value_RxTxX)

    x_RxTxD = run_layers(
        point.config,
        params,
        stream_LxBxTxD[start, rows.place_R],
        start,
        point.config.n_layers,
        Taps(put, (start,) if isinstance(start, int) else None, point.site.kind in INNER_KINDS),
        rules=point.rules,
    ).x
    diff_R = point.logit_difference(params, x_RxTxD, last_R, answers_Rx2)
    return jax.lax.with_sharding_constraint(diff_R, sharding(point.mesh))


patched_rows = jax.jit(_patched_rows, static_argnums=(0, 1))
_patched_rows_of_layer = jax.jit(_patched_rows, static_argnums=(0, 1, 2))


@functools.partial(jax.jit, static_argnums=0)
def _differences(heads: int, clean_LxBxTxX: jax.Array, corrupted_LxBxTxX: jax.Array) -> jax.Array:
    """Return where two runs differ, bool [L, H, B, T]."""
    differs_LxBxTxX = clean_LxBxTxX != corrupted_LxBxTxX
    by_head = differs_LxBxTxX.reshape(*differs_LxBxTxX.shape[:3], heads, -1).any(axis=-1)
    return by_head.transpose(0, 3, 1, 2)


def _rows_to_run(
    heads: int,
    runs: Sequence[Recording],
    positions: str,
    layers: Sequence[int],
    last_P: np.ndarray,
    length: int,
) -> tuple[PatchRows, np.ndarray]:
    """Return the rows in which the two runs differ, by rising layer, and the column of each among the positions."""
    differs_LxHxBxT = to_host(_differences(heads, *(run.value_LxBxTxX for run in runs)))
    wanted_PxT = editable_positions("all" if positions == EACH else positions, last_P, length)
    changed_LxHxPxT = differs_LxHxBxT[:, :, : len(last_P)] & wanted_PxT
    if positions == EACH:
        changed_LxHxPxC = changed_LxHxPxT
        first_PxC = np.broadcast_to(np.arange(length), wanted_PxT.shape)
        stop_PxC = first_PxC + 1
    else:
        changed_LxHxPxC = changed_LxHxPxT.any(axis=-1, keepdims=True)
        first_PxC = wanted_PxT.argmax(axis=1)[:, None]
        stop_PxC = first_PxC + wanted_PxT.sum(axis=1)[:, None]
    is_wanted_L = np.isin(np.arange(len(changed_LxHxPxC)), layers)
    layer_R, head_R, place_R, column_R = np.nonzero(changed_LxHxPxC & is_wanted_L[:, None, None, None])
    ends = first_PxC[place_R, column_R], stop_PxC[place_R, column_R]
    return PatchRows(*(array.astype(np.int32) for array in (layer_R, head_R, place_R, *ends))), column_R


def _start_rows(
    point: SplitPoint,
    heads: int,
    params: decoder.Params,
    base: Recording,
    source_LxBxTxX: jax.Array,
    last_B: np.ndarray,
    answers_Bx2: np.ndarray,
    rows: PatchRows,
    batch_rows: int,
) -> jax.Array:
    """Start the program on some rows, filled up with copies to the size of a batch."""
    # Of long prompts a row for each device, as a row is a whole prompt.
    step = math.lcm(row_step(base.stream_LxBxTxD.shape[2]), document_devices(point.mesh))
    size = -(-min(batch_rows, -(-len(rows.layer_R) // step) * step) // step) * step
    start = int(rows.layer_R[0])
    filled = PatchRows(*(np.resize(array, size) for array in rows))
    arrays = by_row(point.mesh, *filled, last_B[filled.place_R], answers_Bx2[filled.place_R])
    program: Callable[..., jax.Array] = patched_rows
    first: int | np.integer = np.int32(start)
    if isinstance(point.config, TorchConfig):
        program, first = _patched_rows_of_layer, start
    return program(
        point, heads, first, params, base.stream_LxBxTxD, source_LxBxTxX, PatchRows(*arrays[:5]), *arrays[5:]
    )


def _tokenize(lm: LanguageModel, prompts: Sequence[Prompt]) -> tuple[Tokens, Tokens]:
    """Return the tokens of prompts and of their counterparts."""
    return lm.tokenize([prompt.text for prompt in prompts]), lm.tokenize([prompt.counterpart for prompt in prompts])


@dataclasses.dataclass(frozen=True)
class TokenColumn:
    """The tokens at one position of a behaviour's pairs."""

    position: int  #: from the end, -1 is the last token
    token: str  #: the most frequent one
    differs: float  #: share of the pairs whose tokens differ there


def describe_columns(lm: LanguageModel, prompts: Sequence[Prompt]) -> tuple[TokenColumn, ...]:
    """Return the tokens at each position, counted from the end, first position first."""
    text = token_text(lm.tokenizer)
    sides = _tokenize(lm, prompts)
    columns = []
    for position in range(-int(sides[0].lengths_B.max()), 0):
        has_P = sides[0].lengths_B + position >= 0
        ids, counterpart_ids = (tokens.ids_BxT[has_P, (tokens.lengths_B + position)[has_P]] for tokens in sides)
        ((token, _),) = collections.Counter(ids.tolist()).most_common(1)
        columns.append(TokenColumn(position, text(token), float((ids != counterpart_ids).mean())))
    return tuple(columns)


@dataclasses.dataclass(frozen=True)
class PatchedSites:
    """A kind of site patched in every layer on a behaviour; also in `<behaviour>.json`."""

    prompts: int  #: test prompts with a counterpart of as many tokens
    left_out: Mapping[str, int]  #: other test prompts, by reason
    clean: Interval  #: logit difference of the prompts, without a patch
    corrupted: Interval  #: their counterparts', for the prompts' answers
    #: whether the logit difference clearly falls from the prompts to their counterparts, and effects are divided by its
    #: fall.
    is_normalised: bool
    columns: tuple[TokenColumn, ...]  #: the tokens at each position, first to last
    #: heads of GPT-2 small that were published for this behaviour; None: none were, or of another model
    published: tuple[PublishedHead, ...] | None = None


@dataclasses.dataclass(frozen=True)
class SitePatchResults:
    """A kind of site patched between prompts and counterparts."""

    kind: str  #: kind of site
    positions: str  #: each, or the positions that were patched together
    behaviours: Mapping[str, PatchedSites]  #: results by behaviour
    unpatched: Mapping[str, str]  #: behaviours that cannot be patched, and why


@dataclasses.dataclass(frozen=True)
class Interchange:
    """Share of pairs whose preferred answer becomes the counterpart's when the counterpart's values are put in.

    Only pairs count on which the model prefers the right answer of both (Geiger et al., 2021, arXiv 2106.02997).
    """

    prompts: int  #: number of these pairs
    top: Interval  #: with the top features, 95 % Wilson interval
    random: float | None  #: mean over random lists of the dose of the top features; None without any
    site: Interval  #: with the whole site at all positions, the ceiling of its parts


@dataclasses.dataclass(frozen=True)
class PatchedFeatures:
    """Features of a dictionary patched on a behaviour; also in `<behaviour>.json`."""

    left_out: Mapping[str, int]  #: test prompts without a counterpart of as many tokens, by reason
    restored: Interval  #: logits that the top features restore in the counterparts (denoising)
    interchange: Interchange | None  #: None where the model is right about both prompt and counterpart on no pair


@dataclasses.dataclass(frozen=True)
class FeaturePatchResults:
    """Features of a dictionary patched between prompts and counterparts."""

    dictionary: str  #: name of the dictionary
    site: str  #: site that is changed: where the dictionary writes to, or reads
    k: int  #: number of top features
    behaviours: Mapping[str, PatchedFeatures]  #: results by behaviour
    unpatched: Mapping[str, str]  #: behaviours that cannot be patched, and why
    verdict: CausalVerdict  #: the answers on giving top features their counterparts' activations (noising)


PatchResults = SitePatchResults | FeaturePatchResults


@dataclasses.dataclass(frozen=True)
class PatchGrid(Columns):
    """The mean effect at every location; arrays [N], sorted by direction, layer, head and position."""

    kind = "patching"

    direction: np.ndarray  #: one of ``DIRECTIONS``
    layer: np.ndarray  #: counted from 0
    head: np.ndarray  #: counted from 0; null at sites of the whole stream
    position: np.ndarray  #: from the end, -1 is the last token; null where several positions were patched together
    effect: np.ndarray  #: mean over the prompts, logits
    #: lower end of its 95 % bootstrap interval over prompts within templates; null with fewer than 2 prompts.
    low: np.ndarray
    high: np.ndarray  #: its upper end
    #: effect / (clean - corrupted), a ratio of means over the same prompts; null where clean - corrupted is not clearly
    #: above 0.
    normalised: np.ndarray
    prompts: np.ndarray  #: number of prompts with a token there

    @classmethod
    def of(cls, patched: PatchEffects, weight_RxP: np.ndarray) -> "PatchGrid":
        """Summarise the effects on one behaviour, given the weights of its prompts in bootstrap samples."""
        effect_DxLxHxPxC, whole_P = patched.effect_DxLxHxPxC, patched.clean_P - patched.corrupted_P
        *shape, _, columns = effect_DxLxHxPxC.shape
        values_5xDxLxHxC = np.full((5, *shape, columns), np.nan)
        # Where prompt and counterpart hardly differ, a normalised effect divides by noise.
        has_difference = is_measurable(whole_P, weight_RxP)
        for column in range(columns):
            has_P = ~np.isnan(effect_DxLxHxPxC[0, 0, 0, :, column])
            effect_NxQ = effect_DxLxHxPxC[..., has_P, column].reshape(-1, has_P.sum())
            rows = np.full((5, len(effect_NxQ)), np.nan)
            rows[0], rows[4] = effect_NxQ.mean(axis=1), has_P.sum()
            if has_P.sum() > 1:
                weight_RxQ = weight_RxP[:, has_P]
                sum_Rx1 = weight_RxQ.sum(axis=1, keepdims=True)
                # Prompts without this position drop out of a sample, so the weights of the rest are scaled to sum to 1.
                weight_RxQ = np.divide(weight_RxQ, sum_Rx1, out=np.zeros_like(weight_RxQ), where=sum_Rx1 > 0)
                rows[1:3] = np.quantile(weight_RxQ @ effect_NxQ.T, [0.025, 0.975], axis=0)
            if has_difference and whole_P[has_P].mean() > 0:
                rows[3] = rows[0] / whole_P[has_P].mean()
            values_5xDxLxHxC[..., column] = rows.reshape(5, *shape)
        direction_N, layer_N, head_N, column_N = (index.ravel() for index in np.indices(values_5xDxLxHxC.shape[1:]))
        effect, low, high, normalised, prompts = (values.ravel() for values in values_5xDxLxHxC)
        nowhere_N = np.full(len(column_N), np.nan)
        return cls(
            direction=np.array(DIRECTIONS, object)[direction_N],
            layer=np.array(patched.layers)[layer_N],
            head=head_N if shape[-1] > 1 else nowhere_N,
            position=nowhere_N if patched.positions != EACH else column_N - columns,
            effect=effect,
            low=low,
            high=high,
            normalised=normalised,
            prompts=prompts.astype(np.int64),
        )

    def matrix(self, name: str, direction: str) -> np.ndarray:
        """Return the column of this name, of one direction, as [L, H x C]."""
        chosen = getattr(self, name)[self.direction == direction]
        return chosen.reshape(len(np.unique(self.layer)), -1)


def is_measurable(difference_P: np.ndarray, weight_RxP: np.ndarray) -> bool:
    """Return whether the whole interval of clean - corrupted is above 0; False for one prompt, which has none.

    Args:
      difference_P: clean - corrupted logit difference of each pair of prompts.
      weight_RxP: weights of the prompts in bootstrap samples.
    """
    return len(difference_P) > 1 and mean_interval(difference_P, weight_RxP).low > 0
