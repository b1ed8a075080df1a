"""A prompt that was run with transcoders or SAEs, as targets and graphs see it: its tokens and its active features."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.graph.nodes import FEATURE, Nodes
from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.config import RunRules
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import Tokens, encode
from saejax.parallel.collectives import to_host
from saejax.short_reprs import has_short_repr

_INT32 = np.iinfo(np.int32).min, np.iinfo(np.int32).max
AT_ONCE = 1 << 26  # activations of a layer that are in memory at once


class NothingActive(UserError):
    """No feature is active in a prompt."""


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Active:
    """The features that are active in a prompt, in the order (layer, position, feature)."""

    #: layer_A, position_A, feature_A: int32 layer, position and index of each.
    layer_A: np.ndarray
    position_A: np.ndarray
    feature_A: np.ndarray
    value_A: np.ndarray  #: fp32 activation, which for active features is the pre-activation
    b_enc_A: np.ndarray  #: fp32 bias of the encoder, a part of it

    def __len__(self) -> int:
        return len(self.layer_A)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Active":
        return Active(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @property
    def nodes(self) -> Nodes:
        """The features as nodes of a graph."""
        return Nodes.of(FEATURE, self.layer_A, self.position_A, self.feature_A, self.value_A)

    @classmethod
    def concatenate(cls, parts: Sequence["Active"]) -> "Active":
        """Return the features of several layers, given in the order of layers."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def of_layer(self, layer: int) -> slice:
        """Return the slice of a layer's features."""
        return slice(*np.searchsorted(self.layer_A, [layer, layer + 1]))

    @functools.cached_property
    def index_of(self) -> dict[tuple[int, int, int], int]:
        """The index of each feature, by layer, position and feature."""
        keys = zip(self.layer_A.tolist(), self.position_A.tolist(), self.feature_A.tolist(), strict=True)
        return {key: index for index, key in enumerate(keys)}

    def find(self, layer_J: np.ndarray, position_J: np.ndarray, feature_J: np.ndarray) -> np.ndarray:
        """Return the indices of some features, int64 [J].

        Raises:
          UserError: one of them is not active.
        """
        keys = zip(layer_J.tolist(), position_J.tolist(), feature_J.tolist(), strict=True)
        index_J = np.array([self.index_of.get(key, -1) for key in keys], np.int64)
        for missing in np.flatnonzero(index_J < 0)[:1]:
            raise UserError(
                f"feature {feature_J[missing]} of layer {layer_J[missing]} is not active at position "
                f"{position_J[missing]}: is the graph one of this prompt and set?"
            )
        return index_J


def active_features(encoder: Dictionary, layer: int, read_TxD: jax.Array, used_T: np.ndarray) -> Active:
    """Return a layer's active features.

    Args:
      encoder: of the layer; its decoder is not used.
      layer: its number.
      read_TxD: what the encoder reads.
      used_T: True where features are used.
    """
    length = len(read_TxD)
    size = max(1, min(length, AT_ONCE // encoder.config.n_features))  # positions that are encoded at once
    positions, features, values = [], [], []
    for start in range(0, length, size):
        chunk = slice(start, start + size)
        acts_TxF = to_host(encode_used(encoder, read_TxD[chunk], used_T[chunk]))
        # On the host and sparse: all activations of a layer are far more than the nonzero ones.
        position_A, feature_A = np.nonzero(acts_TxF)
        positions.append(position_A + start)
        features.append(feature_A)
        values.append(acts_TxF[position_A, feature_A])
    feature_A, value_A = np.concatenate(features), np.concatenate(values)
    return Active(
        np.full(len(value_A), layer, np.int32),
        np.concatenate(positions).astype(np.int32),
        feature_A.astype(np.int32),
        value_A,
        to_host(encoder.b_enc_F[...])[feature_A],
    )


def activations(encoder: Dictionary, read_xD: jax.Array) -> jax.Array:
    """Return activations [..., F], 0 at attention sinks, where no feature is used."""
    acts_xF = encoder.encode(read_xD)
    return jnp.where(encoder.is_not_sink(read_xD)[..., None], acts_xF, jnp.zeros_like(acts_xF))


def activations_of(encoder: Dictionary, read_MxD: jax.Array, feature_M: jax.Array) -> jax.Array:
    """Return activations of single features, [M].

    Args:
      encoder: of the features.
      read_MxD: what it reads.
      feature_M: the feature of each value that is read.
    """
    return jnp.take_along_axis(activations(encoder, read_MxD), feature_M[:, None], axis=1)[:, 0]


@jax.jit
def encode_used(encoder: Dictionary, read_xTxD: jax.Array, used_xT: jax.Array) -> jax.Array:
    """Return activations [..., T, F] of what is read [..., T, D], 0 at sinks and where ``used_xT`` is False."""
    acts_xTxF = activations(encoder, read_xTxD)
    return jnp.where(used_xT[..., None], acts_xTxF, jnp.zeros_like(acts_xTxF))


@dataclasses.dataclass(eq=False, repr=False)
class PromptRun:
    """A model that was run on a prompt with dictionaries."""

    model: LanguageModel  #: the model
    dictionaries: LayerDictionaries  #: the transcoders or SAEs whose features are nodes
    rules: RunRules  #: rules for gradients through the model
    ids_P: np.ndarray  #: int32 token ids
    active: Active  #: the active features
    logits_V: np.ndarray  #: fp32 logits at the last position
    last_D: jax.Array  #: fp32 stream leaving the last layer at the prompt's last position
    stream_LxTxD: jax.Array  #: fp32 stream entering each layer

    def check(self) -> None:
        """Refuse a run whose logits are not finite, or in which no feature is active."""
        if not np.isfinite(self.logits_V).all():
            raise UserError(f"the logits of {self.model.source.name} are not finite: try --model.dtype=float32")
        if not len(self.active):
            name = self.dictionaries.name
            raise NothingActive(f"no feature of {name} is active in this prompt: is it of this model?")

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """Return what biases of no source add to the pre-activations of some active features, fp32 [F]."""
        return self.active.b_enc_A[chosen_F]


@has_short_repr
@dataclasses.dataclass(frozen=True)
class LocalRun:
    """Values read from R edited runs of a prompt, fp32."""

    feature_RxJ: np.ndarray  #: pre-activations of the requested features
    readout_RxK: np.ndarray  #: the readouts, as ``Readouts.value_K`` has them
    logits_RxV: np.ndarray | None = None  #: logits at the last position; None: not requested

    def checked(self) -> "LocalRun":
        """Return this, or refuse it if a value is not finite; see ``check_finite``."""
        for array in (self.feature_RxJ, self.readout_RxK, self.logits_RxV):
            if array is not None:
                check_finite(array)
        return self


def as_index(number: Any) -> int:
    """Return a whole number of Python, NumPy or JAX as Python's; -1 for anything else."""
    try:
        return operator.index(number)
    except TypeError:
        return -1


def check_finite(read_x: np.ndarray) -> np.ndarray:
    """Return what was read after changes, or refuse it if it is not finite.

    Only what is read is checked: an activation that no feature can have overflows somewhere on the way.
    """
    if not np.isfinite(read_x).all():
        raise UserError("the model is not finite after these changes: give features values that they can have")
    return read_x


def prompt_ids(
    model: LanguageModel, prompt: str | Sequence[int] | np.ndarray | Tokens, chat: bool = False
) -> np.ndarray:
    """Return the token ids of a prompt, int32 [P].

    Args:
      model: whose tokenizer reads a text.
      prompt: the text, which begins as all texts of the model (``LanguageModel.bos``); or its token ids, which are
        taken as they are, also as the tokens of one text (``LanguageModel.tokenize``).
      chat: put a text into the tokenizer's chat template.

    Raises:
      UserError: the tokenizer has no chat template, or there are no ids, more than the model reads, or one that it
        does not know.
    """
    if isinstance(prompt, Tokens):
        if len(prompt.lengths_B) != 1:
            raise UserError(f"the prompt is the tokens of {len(prompt.lengths_B)} texts: expected one")
        prompt = prompt.ids_BxT[0, : prompt.lengths_B[0]]
    if not hasattr(prompt, "__len__"):
        raise UserError(f"the prompt is {prompt!r:.60}: expected a text, or the token ids of one, whole numbers")
    if not len(prompt):
        raise UserError("the prompt is empty: expected a text, or token ids")
    if chat and isinstance(prompt, str):
        prompt = _apply_chat_template(model, prompt)
    if not isinstance(prompt, str):
        ids = np.asarray(prompt)
        if ids.dtype.kind not in "iu" or ids.size != ids.shape[-1]:
            raise UserError(f"the prompt is {prompt!r:.60}: expected a text, or the token ids of one, whole numbers")
        # Unsigned ones have no numbers below 0 to be cut at; the check below names what does not exist.
        ids = np.clip(ids.reshape(-1).astype(np.int64), *_INT32).astype(np.int32)
    else:
        ids = model.tokenize([prompt]).ids_BxT[0]
    Tokens(ids[None], np.array([len(ids)], np.int32)).check(model.config.vocab, model.config.context)
    return ids


def _apply_chat_template(model: LanguageModel, prompt: str) -> list[int]:
    """Return the ids of a user's turn and the beginning of the answer; the template writes special tokens itself."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {model.source.name} has no chat template: leave --graph.chat_template out")
    messages = [dict(role="user", content=prompt)]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode(model.tokenizer, text, bos="never")
