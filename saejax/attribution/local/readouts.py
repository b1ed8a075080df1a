"""Readouts: logits as directions of the residual stream, and programs that read the stream in edited runs.

A logit is read from the stream leaving the last layer, at the last position, through the final norm, whose factor is
constant where the model is frozen. Its direction is its column of the unembedding less the mean over the vocabulary, as
only differences of logits matter. Capping of logits is left out of it; probabilities come from the capped logits.
Any other ``Direction`` is read at the same place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from saejax.attribution.graph.data import name_difference
from saejax.attribution.local.state import RELP, FrozenModel, LocalRun, PromptRun, as_index, padded
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.language_model import LanguageModel
from saejax.models.layers import einsum, norm
from saejax.models.tokens import continuation_ids, token_text
from saejax.parallel.collectives import to_host
from saejax.short_reprs import has_short_repr

_READ = 128  # directions that are read at once, so that layers and prompts share a program
_STEP = 16  # least size to which logits are filled up


@has_short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A direction that a graph explains in place of a logit, such as a probe's."""

    name: str  #: how the graph and its page call it
    vector_D: np.ndarray  #: its dot product with the final norm's output at the last position is explained


Target = str | int | tuple[str | int, str | int] | Direction


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Readouts:
    """K logits, differences of two or directions, read from the stream leaving the last layer at the last position."""

    pair_Kx2: np.ndarray  #: int32 tokens of a difference; the second is -1 for a logit, both are for a direction
    column_KxD: np.ndarray  #: fp32 directions behind the final norm: columns of the unembedding, less mean or second
    vector_KxD: np.ndarray  #: fp32 the same, pulled back through the final norm at the prompt's scale
    value_K: np.ndarray  #: fp32 dot product with the stream, plus biases
    constant_K: np.ndarray  #: fp32 part of it that biases of the final norm and the unembedding are
    weight_K: np.ndarray  #: fp32 weight in influences: the probability of a token, else 1
    logit_K: np.ndarray  #: fp32 logit, or difference of two, or value of a direction
    labels: tuple[str, ...]  #: names

    def __len__(self) -> int:
        return len(self.labels)


def as_targets(targets: Any) -> list[Target]:
    """Return targets as a list; a single target is a list of one, not of its letters.

    Raises:
      UserError: they are neither.
    """
    if isinstance(targets, str | Integral | Direction) or getattr(targets, "ndim", 1) == 0:
        return [targets]
    try:
        return list(targets)
    except TypeError:
        raise UserError(
            f"targets is {targets!r:.60}: expected a token, as its id or a text, a Direction, or a list of such and of "
            "pairs of tokens; () for the most probable tokens"
        ) from None


def read_targets(run: PromptRun, targets: Sequence[Target], max_logits: int, logit_mass: float) -> Readouts:
    """Return the requested targets.

    Args:
      run: of the prompt.
      targets: tokens (ids, or texts of one token), pairs of them for the difference of their logits, or directions;
        none: the most probable tokens.
      max_logits: maximum number of tokens, where no targets are named.
      logit_mass: the smallest set of tokens with this total probability is taken, 0 to 1.

    Raises:
      UserError: a token does not exist, a text is not one token, or a direction has another width or is not finite.
    """
    probability_V = softmax(run.logits_V.astype(np.float64))
    if not targets:
        order = np.argsort(-probability_V, kind="stable")[: max(max_logits, 1)]
        # The token that reaches the share is one of them.
        count = int(np.searchsorted(np.cumsum(probability_V[order]), logit_mass)) + 1
        targets = [int(token) for token in order[:count]]
    model, text, count = run.model, token_text(run.model.tokenizer), len(targets)
    # Filled up, so that prompts with other numbers of targets share the program.
    pair_Xx2 = np.full((padded(count, _STEP), 2), -1, np.int32)
    pair_Xx2[:count] = target_pairs(model, targets)
    given_XxD = np.zeros((len(pair_Xx2), model.config.d_model), np.float32)
    for place, target in enumerate(targets):
        if isinstance(target, Direction):
            given_XxD[place] = target.vector_D
    arrays = pull_targets(model.config, run.rules, model.params, run.last_D, *pair_Xx2.T, given_XxD)
    column_KxD, vector_KxD, value_K, constant_K = (to_host(array)[:count] for array in arrays)
    first_K, second_K = pair_Xx2[:count].T
    single_K, given_K = second_K < 0, first_K < 0
    names = [target.name if isinstance(target, Direction) else "" for target in targets]
    return Readouts(
        pair_Kx2=pair_Xx2[:count],
        column_KxD=column_KxD,
        vector_KxD=vector_KxD,
        value_K=value_K,
        constant_K=constant_K,
        weight_K=np.where(single_K & ~given_K, probability_V[first_K], 1).astype(np.float32),
        logit_K=np.where(given_K, value_K, run.logits_V[first_K] - np.where(single_K, 0, run.logits_V[second_K])),
        labels=tuple(
            name or (text(a) if b < 0 else name_difference(text(a), text(b)))
            for name, (a, b) in zip(names, pair_Xx2[:count].tolist(), strict=True)
        ),
    )


def target_pairs(model: LanguageModel, targets: Sequence[Target]) -> list[tuple[int, int]]:
    """Return the token of each target and the one whose logit is subtracted, -1 for none.

    Raises:
      UserError: a target is no token and no pair of two different ones, or appears twice; or a direction has no name
        of its own, or another shape than the stream, or is not finite.
    """
    pairs, names = [], set[str]()
    for target in targets:
        if isinstance(target, Direction):
            shape, width = np.shape(target.vector_D), model.config.d_model
            if (
                not isinstance(target.name, str)
                or not target.name
                or shape != (width,)
                or not np.isfinite(target.vector_D).all()
            ):
                raise UserError(
                    f"the direction {target.name!r} has the shape {shape}: expected a text as its name, and {width} "
                    "finite numbers"
                )
            if target.name in names:
                raise UserError(f"two directions are called {target.name!r}: expected a name for each")
            names.add(target.name)
            pairs.append((-1, -1))
            continue
        tokens = tuple(target) if isinstance(target, tuple | list) else (target,)
        pair = [token_of(model, token) for token in tokens[:2]]
        if not 1 <= len(tokens) <= 2 or len(set(pair)) < len(tokens):
            raise UserError(f"the target {target!r} is no difference of two logits: expected two tokens that differ")
        pairs.append((pair[0], pair[1] if pair[1:] else -1))
        if pairs.count(pairs[-1]) > 1:
            raise UserError(f"the target {target!r} appears twice: expected each target once")
    return pairs


def token_of(model: LanguageModel, target: str | int) -> int:
    """Return the id of a token; of a text, the one with which it continues another, taken as it is written.

    Raises:
      UserError: the text is not one token, or there is no such token.
    """
    if isinstance(target, str):
        ids = continuation_ids(model.tokenizer, target)
        if len(ids) != 1:
            raise UserError(
                f"the target {target!r} is {len(ids)} tokens: expected a text of one, such as ' Paris', or a pair"
            )
        return int(ids[0])
    token = as_index(target)
    if not 0 <= token < model.config.vocab:
        raise UserError(f"the target token {target!r:.60} does not exist: expected 0 to {model.config.vocab - 1}")
    return token


@functools.partial(jax.jit, static_argnums=(0, 1))
def pull_targets(
    config: DecoderConfig,
    rules: RunRules,
    params: decoder.Params,
    last_D: jax.Array,
    first_K: jax.Array,
    second_K: jax.Array,
    given_KxD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return targets, of logits before capping, as directions of the stream that leaves the last layer.

    Args:
      config: of the decoder (static).
      rules: say whether the final norm's factor is constant.
      params: of the model.
      last_D: that stream at the last position.
      first_K: token ids; -1 where a direction is given.
      second_K: token ids that are subtracted; -1 for the mean over the vocabulary.
      given_KxD: the directions behind the final norm that are given.

    Returns:
      The directions [K, D] behind the final norm and before it, the values [K], and the part of them [K] that biases
      are.
    """
    given_K = first_K < 0
    embed_VxD = params["embed_VxD"] if config.tied else params["unembed_DxV"].T
    rows_VxD = embed_VxD.astype(last_D.dtype)

    def less(rows: jax.Array) -> jax.Array:
        """Return the rows of the first tokens less the rows of the second ones or the mean."""
        single = jnp.reshape(second_K < 0, (-1,) + (1,) * (rows.ndim - 1))
        # Less the mean over the vocabulary, as only differences of logits matter.
        return rows[first_K] - jnp.where(single, jnp.mean(rows, axis=0, keepdims=True), rows[second_K])

    column_KxD = jnp.where(given_K[:, None], given_KxD.astype(last_D.dtype), less(rows_VxD))
    # By the rules the norm's factor is constant where the model is frozen; then this is its transpose.
    final_D, pull = jax.vjp(functools.partial(norm, config, rules, params, "final_norm"), last_D)
    constant_K = jnp.zeros(len(column_KxD), last_D.dtype)
    if "final_norm_bias_D" in params:
        constant_K += einsum("kd,d->k", column_KxD, params["final_norm_bias_D"].astype(last_D.dtype))
    bias = jnp.where(given_K, 0, less(params["unembed_bias_V"].astype(last_D.dtype))) if config.unembed_bias else 0
    value_K = einsum("kd,d->k", column_KxD, final_D) + bias
    return column_KxD, jax.vmap(pull)(column_KxD)[0], value_K, constant_K + bias


def scatter_directions(
    layer: int, layer_R: np.ndarray, position_R: np.ndarray, vector_RxD: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Return the directions that targets read at a layer, each at its position, else 0, fp32 [B, T, D].

    Args:
      layer: its number, or the number of layers for the stream leaving the last one.
      layer_R: the layer at which each target reads.
      position_R: where.
      vector_RxD: what it reads.
      shape: B, at least the number of targets, and T.
    """
    read_BxTxD, here = np.zeros((*shape, vector_RxD.shape[1]), np.float32), np.flatnonzero(layer_R == layer)
    read_BxTxD[here, position_R[here]] = vector_RxD[here]
    return read_BxTxD


def read_changes(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: np.ndarray, vector_JxD: np.ndarray) -> np.ndarray:
    """Return how much dot products of directions with a stream differ from the prompt's, [R, J].

    Args:
      x_TxD: the stream of the prompt.
      x_RxTxD: the same stream in the rows.
      position_J: positions that are read.
      vector_JxD: directions that are read there.
    """
    count, parts = len(position_J), []
    for start in range(0, count, _READ):
        room = max(start + _READ - count, 0)
        position_X = np.pad(position_J[start : start + _READ], (0, room))
        vector_XxD = np.pad(vector_JxD[start : start + _READ], ((0, room), (0, 0)))
        parts.append(to_host(_read_changes(x_TxD, x_RxTxD, position_X, vector_XxD)))
    return np.concatenate(parts, axis=1)[:, :count]


@jax.jit
def _read_changes(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: jax.Array, vector_JxD: jax.Array) -> jax.Array:
    # The difference first: a difference of two nearly equal products would be rounding.
    return einsum("rjd,jd->rj", (x_RxTxD - x_TxD[None])[:, position_J], vector_JxD)


def read_last(frozen: FrozenModel, freeze: str, last_D: jax.Array, x_RxD: jax.Array, readouts: Readouts) -> np.ndarray:
    """Return how much readouts of the stream leaving the last layer differ from the prompt's, [R, K].

    Args:
      frozen: the model.
      freeze: what the final norm keeps, one of ``state.FREEZE_MODES``.
      last_D: the stream of the prompt at the last position.
      x_RxD: the same stream in the rows.
      readouts: what is read.
    """
    vector_KxD = readouts.vector_KxD  # pulled back through the final norm with the prompt's scale
    if freeze != "all":
        # Each row has its own scale. The columns were picked once: the unembedding is not read again for a run.
        x_BxD = _final_norm(frozen, jnp.concatenate([last_D[None], x_RxD]))
        last_D, x_RxD, vector_KxD = x_BxD[0], x_BxD[1:], readouts.column_KxD
    return read_changes(last_D[None], x_RxD[:, None], np.zeros(len(readouts), np.int32), vector_KxD)


@jax.jit
def _final_norm(frozen: FrozenModel, x_BxD: jax.Array) -> jax.Array:
    return norm(frozen.config, RELP, frozen.params, "final_norm", x_BxD)


class Readings:
    """Values read from edited runs of a prompt, kept as the prompt's own values plus what changes.

    So a small effect keeps its digits: it is no difference of numbers that came from two programs.

    Args:
      run: of the prompt.
      rows: number of edited runs.
      readouts: what is read at the end; None: nothing.
      features: active features, as indices into ``run.active``, whose pre-activations are read.
      logits: whether ``logits_RxV`` is there.

    Attributes:
      layers: in which features are read, ascending.
      logits_RxV: fp32 logits at the last position, at first the prompt's; None: not requested.

    Raises:
      UserError: an index is none of an active feature.
    """

    def __init__(
        self,
        run: PromptRun,
        rows: int,
        readouts: Readouts | None,
        features: Sequence[int] | np.ndarray,
        logits: bool,
    ):
        self._readouts, self._wanted = readouts, run.active[_checked_indices(run, features)]
        wanted = self._wanted
        self._encoder_JxD = run.dictionaries.rows_of("W_enc", wanted.layer_A, wanted.feature_A)
        self._feature_RxJ = np.tile(wanted.value_A, (rows, 1))
        self._readout_RxK = np.tile(readouts.value_K if readouts else np.empty(0, np.float32), (rows, 1))
        self.logits_RxV = np.tile(run.logits_V, (rows, 1)) if logits else None
        self.layers: list[int] = np.unique(wanted.layer_A).tolist()

    def read_layer(self, rows: slice, layer: int, read_BxTxD: jax.Array) -> None:
        """Read features of a layer.

        Args:
          rows: which edited runs these are.
          layer: its number.
          read_BxTxD: what its dictionary reads in the prompt, which comes first, and in the rows; padding may follow.
        """
        here = np.flatnonzero(self._wanted.layer_A == layer)
        if len(here):
            places = self._wanted.position_A[here], self._encoder_JxD[here]
            changes_RxJ = read_changes(read_BxTxD[0], read_BxTxD[1:], *places)
            self._feature_RxJ[rows, here] += changes_RxJ[: rows.stop - rows.start]

    def read_last(self, rows: slice, frozen: FrozenModel, freeze: str, last_D: jax.Array, x_RxD: jax.Array) -> None:
        """Read the readouts.

        Args:
          rows: which edited runs these are.
          frozen: the model.
          freeze: what the final norm keeps, one of ``state.FREEZE_MODES``.
          last_D: the stream of the prompt at the last position, leaving the last layer.
          x_RxD: the same stream in the rows; padding may follow.
        """
        if self._readouts:
            changes_RxK = read_last(frozen, freeze, last_D, x_RxD, self._readouts)
            self._readout_RxK[rows] += changes_RxK[: rows.stop - rows.start]

    def checked(self) -> LocalRun:
        """Return what was read, or refuse it if a value is not finite."""
        return LocalRun(self._feature_RxJ, self._readout_RxK, self.logits_RxV).checked()


def _checked_indices(run: PromptRun, features: Any) -> np.ndarray:
    """Return indices into ``run.active``, int64 [J]; raise a ``UserError`` if some are none."""
    indices = np.asarray(features)
    is_index = not indices.size or indices.dtype.kind in "iu"
    if indices.ndim != 1 or not is_index or ((indices < 0) | (indices >= len(run.active))).any():
        raise UserError(
            f"features is {features!r:.60}: expected a list of places in the active features, 0 to "
            f"{len(run.active) - 1}"
        )
    return indices.astype(np.int64)
