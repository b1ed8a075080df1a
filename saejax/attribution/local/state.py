"""The local replacement model: its frozen layers, and the state of a prompt in it.

One layer. When all that the prompt fixes is frozen, attention weights and the factors of norms (1 / root mean square,
or 1 / standard deviation) are constants, and what the MLP adds is a constant too, but for a transcoder's skip path. So
a layer is an affine function of the stream that enters it: its linear part carries an effect up, the transposed one a
cause down, its constant part is what biases add. It is the decoder's own layer, run by the rules ``RELP``: it has the
model's values, and differentiation takes attention weights and factors as constants. The programs are jitted: the
model's layer with values frozen, and both directions of its linear part.

A prompt. ``PromptRun`` is what targets and graphs see of one that was run with transcoders or SAEs: its tokens and its
active features. ``LocalState`` adds the errors of transcoders. At every layer and every position but the first,

    mlp_out = sum over active features of activation * W_dec + b_dec + skip(read) + error

exactly; features of cross-layer transcoders are active in this layer or below. Attention weights and scales of norms
come from the prompt (``frozen``), so all that comes after is linear in these terms. At the first position, an
attention sink in most models, features are not used: there the MLP's output stands as it is, but for the skip path. In
prompts that begin as Gemma 3's chat template does, that is so at its first four positions, as in circuit-tracer.

The model is run once, layer by layer:

1. The layer gives what its transcoder reads and what its MLP adds.
2. The encoder gives the layer's active features.
3. The decoder rows of these features, read from the file, give what they write; what is left is the error.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

from saejax.arguments import as_numbers
from saejax.attribution.graph.data import FEATURE, Nodes
from saejax.attribution.local.dictionaries import FeatureOutputs, LayerDictionaries, LayerTranscoders
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import (
    AttentionFunction,
    AttentionTables,
    TablesByLayer,
    attend,
    attention_weights,
    query_blocks,
    whole_prompt_tables,
)
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.language_model import LanguageModel
from saejax.models.layers import einsum, norm
from saejax.models.parameters import LAYERS
from saejax.models.tokens import Tokens, encode, make_chat_text
from saejax.parallel.collectives import to_host
from saejax.short_reprs import has_short_repr
from saejax.wording import counted

RELP = RunRules(backward="relp")  # attention weights and factors of norms are constant to differentiation
FREEZE_MODES = ("none", "attention", "all", "constrained")
TEXT_MODES = FREEZE_MODES[:2]  # in which new tokens can follow the prompt
# Modes in which an MLP gives its output in the prompt, so that activations stay as in the prompt.
FIXED = ("all", "constrained")
_INT32 = np.iinfo(np.int32).min, np.iinfo(np.int32).max
AT_ONCE = 1 << 26  # activations of a layer that are in memory at once
# How chat templates begin whose tokens are all sinks: of Gemma 3 "<bos><start_of_turn>user" and a line end.
CHAT_STARTS = dict.fromkeys(("gemma3", "gemma3_text"), (2, 105, 2364, 107))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A decoder whose layers are frozen, with the skip paths of its transcoders."""

    config: DecoderConfig = dataclasses.field(metadata=dict(static=True))  #: of the decoder (static)
    params: decoder.Params  #: its parameters
    #: what transcoders read: "mlp_in", what the MLP does; "mlp_normed", the same before the norm's gain; or
    #: "resid_mid", the stream before that norm (static).
    reads: str = dataclasses.field(default="mlp_in", metadata=dict(static=True))
    skip_LxDxD: jax.Array | None = None  #: skip paths of the transcoders, applied as x @ skip; None: there are none

    def skip(self, layer: int | jax.Array, read_xD: jax.Array) -> jax.Array:
        """Return what the skip path of a layer's transcoder gives of what is read, [..., D]."""
        if self.skip_LxDxD is None:
            return jnp.zeros_like(read_xD)
        skip_DxD = lax.dynamic_index_in_dim(self.skip_LxDxD, layer, keepdims=False)
        return einsum("...d,de->...e", read_xD, skip_DxD)

    def layer(
        self,
        layer: int | jax.Array,
        tables: TablesByLayer,
        x_TxD: jax.Array,
        function: AttentionFunction | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the frozen layer.

        Args:
          layer: its number.
          tables: of the prompt.
          x_TxD: the prompt's stream entering the layer: it fixes all constants.
          function: the attention function; None: one that is quick to differentiate backwards, and cannot be forwards.

        Returns:
          The stream leaving the layer without what the MLP adds, unless by the skip path; and what the transcoder
          reads, both [T, D].
        """
        seen: dict[str, jax.Array] = {}

        def hook(kind: str, value_TxD: jax.Array) -> jax.Array:
            seen[kind] = value_TxD
            # What the MLP adds is a source of its own, and no part of the linear layer.
            return value_TxD if kind != "mlp_out" else self.skip(layer, self.read(layer, seen))

        function = function or self._attend
        leaving_TxD = decoder.run_layer(self.config, RELP, self.params, layer, x_TxD, tables, hook, function)
        return leaving_TxD, self.read(layer, seen)

    def _attend(self, q_TxHxK: jax.Array, k_TxNxK: jax.Array, v_TxNxK: jax.Array, tables: AttentionTables) -> jax.Array:
        """Attend as ``attention.attend`` does, with constant weights and a cheap transpose."""
        parts = []
        for queries, keys in query_blocks(len(q_TxHxK), len(k_TxNxK)):
            # The decoder's own blocks, so that values are the model's.
            block = tables.from_query(queries.start)
            block_inputs = q_TxHxK[queries], k_TxNxK[keys]
            parts.append(_weighted(attention_weights(self.config, RELP, *block_inputs, block), v_TxNxK[keys]))
        return jnp.concatenate(parts).reshape(q_TxHxK.shape)

    def read(self, layer: int | jax.Array, seen: Mapping[str, jax.Array], rules: RunRules = RELP) -> jax.Array:
        """Return what the transcoder reads, from the values at a layer's sites.

        Args:
          layer: its number.
          seen: values [..., T, D] by kind of site.
          rules: of the run.
        """
        if self.reads == "mlp_in":
            return seen["mlp_in"]
        stream = seen["resid_pre" if self.config.parallel else "resid_mid"]
        if self.reads == "resid_mid":
            return stream
        config, weights = self.config, decoder.layer_params(self.params, layer)
        name = "attn_norm" if config.shared_norm else "mlp_norm"
        gain_D = weights[f"{name}_D"]
        # A gain of 1, which these norms store as 0.
        plain = {f"{name}_D": jnp.full_like(gain_D, 0 if config.norm == "rms_plus_one" else 1)}
        if config.norm == "layer":
            plain[f"{name}_bias_D"] = jnp.zeros_like(gain_D)
        return norm(config, rules, plain, name, stream)


@jax.custom_vjp
def _weighted(weights_NxGxTxS: jax.Array, v_SxNxK: jax.Array) -> jax.Array:
    """Return the mean of the values with given weights, [T, N, G, K]."""
    return einsum("ngts,snk->tngk", weights_NxGxTxS, v_SxNxK)


def _weighted_back(weights_NxGxTxS: jax.Array, cotangent_TxNxGxK: jax.Array) -> tuple[None, jax.Array]:
    # The cotangent is the second operand, which ``einsum`` would not leave to us: with many of them, XLA then brings
    # together runs of K numbers. Of a first operand it moves single numbers, which takes longer than the product.
    summed, batched = ((1, 2), (2, 0)), ((0,), (1,))
    cotangent_NxSxK = lax.dot_general(weights_NxGxTxS, cotangent_TxNxGxK, (summed, batched), precision="highest")
    return None, jnp.swapaxes(cotangent_NxSxK, 0, 1)


_weighted.defvjp(lambda weights, v: (_weighted(weights, v), weights), _weighted_back)


@jax.jit
def embed(frozen: FrozenModel, ids_xT: jax.Array) -> jax.Array:
    """Return the stream entering layer 0, fp32 [..., T, D]: it stays fp32 in all layers, whatever the weights are."""
    x_xTxD = decoder.embed(frozen.config, frozen.params, ids_xT)
    return x_xTxD.astype(jnp.promote_types(x_xTxD.dtype, jnp.float32))


@functools.partial(jax.jit, static_argnums=1)
def run_layer(
    frozen: FrozenModel, freeze: str, layer: jax.Array, x_BxTxD: jax.Array, frozen_until: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run a layer on a batch whose first row is the prompt itself.

    Args:
      frozen: the model.
      freeze: what stays as it is in the first row, one of ``FREEZE_MODES`` (static).
      layer: its number.
      x_BxTxD: the streams entering it.
      frozen_until: attention is frozen at positions before this one.

    Returns:
      The streams leaving it, what its transcoder reads, and what its MLP adds, each [B, T, D].
    """
    # With everything frozen, norm scales come from the first row, too.
    config, rules = frozen.config, RunRules(first_fixes=freeze == "all")
    seen: dict[str, jax.Array] = {}

    def hook(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind == "mlp_out" and freeze in FIXED:
            read_BxTxD = frozen.read(layer, seen, rules)
            # Each run gets the prompt's MLP output, which the first row has; the skip path alone reacts.
            change_BxTxD = frozen.skip(layer, read_BxTxD - read_BxTxD[:1])
            value_BxTxD = jnp.broadcast_to(value_BxTxD[:1], value_BxTxD.shape) + change_BxTxD
        seen[kind] = value_BxTxD
        return value_BxTxD

    def attend_as_prompt(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
        # Weights of the first row with the row's own values: what a token attends to is frozen, not what it finds
        # there.
        first_q, first_k = (jnp.broadcast_to(part[:1], part.shape) for part in (q, k))
        frozen_T = jnp.arange(x_BxTxD.shape[1]) < frozen_until
        as_prompt = attend(config, rules, first_q, first_k, v, tables)
        # Both are computed where new tokens follow a frozen prompt; a position takes one of them.
        return jnp.where(frozen_T[None, :, None, None], as_prompt, attend(config, rules, q, k, v, tables))

    function = attend_as_prompt if freeze in ("attention", "constrained") else None
    tables = whole_prompt_tables(config, x_BxTxD.shape[1])
    leaving_BxTxD = decoder.run_layer(config, rules, frozen.params, layer, x_BxTxD, tables, hook, function)
    return leaving_BxTxD, frozen.read(layer, seen, rules), seen["mlp_out"]


@jax.jit
def run_biases(frozen: FrozenModel, stream_LxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the constant parts of all layers: what biases add to the stream and to what is read, both [L, T, D].

    A constant part is linear in the biases, so it is its own derivative along them. ``stream_LxTxD`` is the prompt's
    stream entering each layer.
    """
    tables = whole_prompt_tables(frozen.config, stream_LxTxD.shape[1])
    biases = layer_biases(frozen.params)
    function = functools.partial(attend, frozen.config, RELP)  # which can be differentiated this way round

    def step(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        layer, x_TxD = part

        def run(biases: decoder.Params) -> tuple[jax.Array, jax.Array]:
            """Run the layer with these biases."""
            changed = dataclasses.replace(frozen, params={**frozen.params, **biases})
            return changed.layer(layer, tables, x_TxD, function)

        return None, jax.jvp(run, (biases,), (biases,))[1]

    return lax.scan(step, None, (jnp.arange(frozen.config.n_layers), stream_LxTxD))[1]


def layer_biases(params: decoder.Params) -> decoder.Params:
    """Return the biases of layers among the parameters of a decoder."""
    return {name: value for name, value in params.items() if name.startswith(LAYERS) and "_bias" in name}


def padded(count: int, least: int = 4) -> int:
    """Return the size to which tokens, features or rows are padded, so that similar prompts share compiled programs.

    Args:
      count: their number.
      least: the size is a multiple of this, and at most a quarter larger where there are many.
    """
    step = max(least, (1 << count.bit_length()) >> 3)
    return max(-(-count // step), 1) * step


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
    # Sinks at the target are not left out, unlike in training and edits: circuit-tracer, with whose graphs these are
    # compared, leaves out the first positions alone, and has features wherever the MLP's output is long. The error has
    # what they do not explain there, so that the sum is the MLP's output in either case.
    return jnp.where(encoder.is_not_sink(read_xD)[..., None], acts_xF, jnp.zeros_like(acts_xF))


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
        ids = as_numbers(prompt, whole=True)
        if ids is None or ids.size != ids.shape[-1]:
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
        raise UserError(f"the tokenizer of {model.source.name} has no chat template: leave --model.chat_template out")
    messages, advice = [dict(role="user", content=prompt)], "leave --model.chat_template out"
    text = make_chat_text(model.tokenizer, messages, advice, add_generation_prompt=True)
    return encode(model.tokenizer, text, bos="never")


class LocalState(PromptRun):
    """The frozen state of one prompt; arrays are on the devices, in fp32.

    Args:
      model: the language model.
      transcoders: of all its layers.
      ids: token ids of the prompt, two at least.

    Attributes:
      frozen: the frozen layers.
      error_LxTxD: what transcoders do not explain; 0 at the first positions and at padding.
      sink_LxP: True at later positions where the norm is that of an attention sink, and no feature is used.
      first_LxUxD: the MLP's output at the first positions, those without features, less the skip path.
      b_dec_LxD: biases of the decoders.

    Raises:
      UserError: the set does not belong to the model, the prompt is too short, a value is not finite, or no
        feature is active.
    """

    dictionaries: LayerTranscoders
    #: bias_LxTxD and read_bias_LxTxD: what the model's own biases in each layer add to the stream and to what is read;
    #: None: it has none in its layers.
    bias_LxTxD: jax.Array | None = None
    read_bias_LxTxD: jax.Array | None = None

    def __init__(self, model: LanguageModel, transcoders: LayerTranscoders, ids: np.ndarray):
        transcoders.check(model)
        self.model, self.dictionaries, self.rules = model, transcoders, RELP
        self.ids_P = np.asarray(ids, np.int32)
        first = first_used(model.config, self.ids_P)
        if len(self.ids_P) <= first:
            which = f"first {first} tokens" if first > 1 else "first token"
            raise NothingActive(
                f"the prompt is {counted(len(self.ids_P), 'token')}, and no feature is used at the {which}: expected a "
                "longer one"
            )
        self.frozen = FrozenModel(model.config, model.params, transcoders.reads)
        # Padded, so that prompts of similar lengths share compiled programs.
        ids_T = np.pad(self.ids_P, (0, padded(len(self.ids_P)) - len(self.ids_P)))
        x_TxD = embed(self.frozen, ids_T)
        self._run_layers(x_TxD, first)
        if any("_bias" in name for name in model.params):
            biases = run_biases(self.frozen, self.stream_LxTxD)
            self.bias_LxTxD, self.read_bias_LxTxD = biases

    def _run_layers(self, x_TxD: jax.Array, first: int) -> None:
        model, transcoders, length = self.model, self.dictionaries, len(x_TxD)
        # Neither at the first positions, where the MLP's output stays whole, nor at padding.
        used_T = (np.arange(length) >= first) & (np.arange(length) < len(self.ids_P))
        outputs, active_by_layer = FeatureOutputs(transcoders, length), list[Active]()
        parts: dict[str, list[jax.Array]] = {}
        for layer in range(model.config.n_layers):
            # 1. The layer.
            leaving, read, out = run_layer(self.frozen, "none", np.int32(layer), x_TxD[None])
            # 2. Its active features.
            encoder = transcoders.encoder(layer, model.mesh)
            active = active_features(encoder, layer, read[0], used_T)
            # 3. What they write, and the error.
            outputs.add(layer, active.position_A, active.feature_A, active.value_A)
            error_TxD, mlp_TxD, sink_T = _errors(encoder, read[0], out[0], outputs.pop(layer), used_T)
            active_by_layer.append(active)
            values = dict(stream=x_TxD, error=error_TxD, first=mlp_TxD[:first], b_dec=encoder.b_dec_D[...], sink=sink_T)
            if encoder.config.skip:
                values["skip"] = encoder.W_skip_DxD[...]
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
            x_TxD = leaving[0]
        self.last_D = lax.dynamic_index_in_dim(x_TxD, np.int32(len(self.ids_P) - 1), keepdims=False)
        self.logits_V = to_host(read_logits(self.frozen, "none", self.last_D, self.last_D[None]))[0]
        self.active = Active.concatenate(active_by_layer)
        stacks: dict[str, Any] = {name: jnp.stack(parts.pop(name)) for name in list(parts)}
        self.stream_LxTxD, self.error_LxTxD = stacks["stream"], stacks["error"]
        self.first_LxUxD, self.b_dec_LxD = stacks["first"], stacks["b_dec"]
        self.sink_LxP = to_host(stacks["sink"])[:, : len(self.ids_P)]
        self.frozen = dataclasses.replace(self.frozen, skip_LxDxD=stacks.get("skip"))
        # First the model: where it is not finite itself, that is the cause to name.
        self.check()
        broken = np.flatnonzero(~to_host(jnp.isfinite(self.error_LxTxD).all(axis=(1, 2))))
        if len(broken):
            raise UserError(
                f"{transcoders.name}, layer {broken[0]}: what the transcoder gives is not finite: its file is damaged, "
                "fetch or train it again"
            )
        if self.sink_LxP.any():
            logging.warning(
                "%d of %d places of the prompt (layer and token after the first) are attention sinks by their norm, "
                "where no feature of %s is used: what the MLP adds there is error",
                int(self.sink_LxP.sum()), self.sink_LxP[:, first:].size, transcoders.name,
            )  # fmt: skip

    @property
    def first(self) -> int:
        """The first position at which features are used."""
        return self.first_LxUxD.shape[1]

    def encoder(self, layer: int) -> Dictionary:
        """Return a layer's encoder, on the model's devices."""
        self.dictionaries.resolve_sinks(self.model)  # another model may have used the set meanwhile
        return self.dictionaries.encoder(layer, self.model.mesh)

    def padded_size(self, name: str, count: int, least: int) -> int:
        """Return the size to which arrays that grow with the active features are padded.

        It is taken from an earlier prompt of this length and set, if it holds them and is at most twice as large: then
        the programs that were compiled for that prompt run this one, too. Otherwise an eighth is left for later ones.

        Args:
          name: of the arrays.
          count: their size.
          least: see ``padded``.
        """
        sizes, key = self.dictionaries.sizes, (name, self.stream_LxTxD.shape[1])
        if not count <= sizes.get(key, 0) <= 2 * count:
            sizes[key] = padded(count + count // 8, least)
        return sizes[key]

    def encoder_rows(self, chosen_F: np.ndarray) -> np.ndarray:
        """Return the directions that some of the active features read, fp32 [F, D]; each layer is read once."""
        return self.dictionaries.rows_of("W_enc", self.active.layer_A[chosen_F], self.active.feature_A[chosen_F])

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """Return the encoder's bias with the bias of the norm that the transcoder reads behind, fp32 [F]."""
        constant_F = super().constants(chosen_F)
        if self.read_bias_LxTxD is None:
            return constant_F
        layer_F, position_F = self.active.layer_A[chosen_F], self.active.position_A[chosen_F]
        # On the host, as features of all layers and positions are picked at once.
        read_FxD = to_host(self.read_bias_LxTxD)[layer_F, position_F]
        return constant_F + np.einsum("fd,fd->f", read_FxD, self.encoder_rows(chosen_F))


def first_used(config: DecoderConfig, ids_P: np.ndarray) -> int:
    """Return the first position of a prompt at which features are used."""
    start = CHAT_STARTS.get(config.family, ())
    return len(start) if start and tuple(ids_P[: len(start)].tolist()) == start else 1


@jax.jit
def _errors(
    encoder: Dictionary,
    read_TxD: jax.Array,
    out_TxD: jax.Array,
    written_TxD: jax.Array,
    used_T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what features do not explain, 0 where they are not used; the MLP's output less the skip path; and sinks.

    Sinks are positions at which features would be used, but for their norm.
    """
    if encoder.config.skip:
        out_TxD = out_TxD - einsum("td,de->te", read_TxD, encoder.W_skip_DxD[...])
    error_TxD = out_TxD - encoder.b_dec_D[...][None] - written_TxD
    sink_T = used_T & ~encoder.is_not_sink(read_TxD)
    return jnp.where(used_T[:, None], error_TxD, jnp.zeros_like(error_TxD)), out_TxD, sink_T


@functools.partial(jax.jit, static_argnums=1)
def read_logits(frozen: FrozenModel, freeze: str, last_D: jax.Array, x_RxD: jax.Array) -> jax.Array:
    """Return the logits of the rows at the last position, [R, V]; see ``edits.Readings``."""
    x_BxD = jnp.concatenate([last_D[None], x_RxD])  # the prompt comes first: its scale may be frozen
    rules = RunRules(first_fixes=freeze == "all")
    return decoder.unembed(frozen.config, frozen.params, x_BxD[:, None], rules)[1:, 0]
