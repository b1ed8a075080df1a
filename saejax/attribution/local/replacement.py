"""The local replacement model of a prompt: the model with each MLP written as features, plus what they leave over.

At every layer and every position but the first,

    mlp_out = sum over active features of activation * W_dec + b_dec + skip(read) + error

exactly; features of cross-layer transcoders are active in this layer or below. Attention weights and factors of norms
are those of the prompt (``frozen``), so all that comes after is linear in these terms. At the first position, an
attention sink in most models, features are not used: there the MLP's output stands as it is, but for the skip path. In
prompts that begin as Gemma 3's chat template does, that is so at its first four positions, as in circuit-tracer.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.active import Active, active_features
from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.local.written import Written
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import whole_prompts
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host

# How chat templates begin whose tokens are all sinks: of Gemma 3 "<bos><start_of_turn>user" and a line end.
CHAT_STARTS = dict.fromkeys(("gemma3", "gemma3_text"), (2, 105, 2364, 107))


@dataclasses.dataclass(frozen=True)
class Replacement(PromptRun):
    """The local replacement model of one prompt; what it holds is on the devices, in fp32.

    Attributes:
      frozen: the layers that stay.
      error_LxTxD: what transcoders do not explain; 0 at the first positions and at padding.
      first_LxUxD: the MLP's output at the first positions, those without features, less the skip path.
      b_dec_LxD: biases of the decoders.
      skip_LxDxD: skip paths of the transcoders, applied as x @ skip; None: there are none.
      bias_LxTxD, read_bias_LxTxD: what the model's own biases in each layer add to the stream and to what is read;
        None: it has none in its layers.
    """

    dictionaries: LayerTranscoders
    frozen: FrozenModel
    error_LxTxD: jax.Array
    first_LxUxD: jax.Array
    b_dec_LxD: jax.Array
    skip_LxDxD: jax.Array | None = None
    bias_LxTxD: jax.Array | None = None
    read_bias_LxTxD: jax.Array | None = None

    @classmethod
    def of(cls, model: LanguageModel, transcoders: LayerTranscoders, ids: np.ndarray) -> "Replacement":
        """Runs the model on a prompt, once, and each transcoder beside its layer.

        Args:
          model: the language model.
          transcoders: of all its layers.
          ids: token ids of the prompt, two at least.

        Raises:
          UserError: the set does not belong to the model, the prompt has a single token, a value is not finite, or no
            feature is active.
        """
        transcoders.check(model)
        ids_P = np.asarray(ids, np.int32)
        first = first_used(model.config, ids_P)
        if len(ids_P) < 2:
            raise UserError("the prompt is a single token, at which no feature is used: expected two at least")
        if len(ids_P) <= first:
            raise UserError(f"no feature is used at the first {first} tokens, and the prompt has no further one")
        frozen, params = FrozenModel(model.config, transcoders.reads), model.params
        last, ids_T = np.int32(len(ids_P) - 1), np.pad(ids_P, (0, padded(len(ids_P)) - len(ids_P)))
        x_TxD = embed(frozen, params, ids_T)
        below = Written(transcoders, len(ids_T))
        found: list[Active] = []
        parts: dict[str, list[jax.Array]] = {}
        broken = []
        for layer in range(model.config.n_layers):
            transcoder = transcoders.load(layer, model.mesh)
            entering_TxD = x_TxD
            x_TxD, read_TxD, out_TxD = run_layer(frozen, params, np.int32(layer), x_TxD)
            used_T = (np.arange(len(ids_T)) >= first) & (np.arange(len(ids_T)) < len(ids_P))
            if (written_TxD := below.at(layer)) is not None:
                out_TxD -= written_TxD
            own, part = active_features(transcoder, layer, read_TxD, out_TxD, used_T)
            below.add(layer, own.position_A, own.feature_A, own.value_A)
            if not (np.isfinite(own.value_A).all() and jnp.isfinite(part["error_LxTxD"]).all()):
                broken.append(layer)
            found.append(own)
            for name, value in dict(stream_LxTxD=entering_TxD, **part).items():
                parts.setdefault(name, []).append(value)
        last_D, logits_V = read_out(frozen, params, x_TxD, last)
        logits_V = to_host(logits_V)
        if not np.isfinite(logits_V).all():
            raise UserError(f"the logits of {model.source.name} are not finite: try --model.dtype=float32")
        if broken:
            raise UserError(
                f"{transcoders.name}, layer {broken[0]}: what the transcoder gives is not finite: its file is damaged, "
                "fetch or train it again"
            )
        active = Active.joined(found)
        if not len(active):
            raise UserError(f"no feature of {transcoders.name} is active in this prompt: is it of this model?")
        stacks: dict[str, Any] = {name: jnp.stack(parts.pop(name)) for name in list(parts)}
        if any("_bias" in name for name in params):
            biases = run_biases(frozen, params, stacks["stream_LxTxD"], stacks.get("skip_LxDxD"))
            stacks |= dict(zip(("bias_LxTxD", "read_bias_LxTxD"), biases, strict=True))
        of_run = model, transcoders, RELP, ids_P, active, logits_V, last_D, stacks.pop("stream_LxTxD")
        return cls(*of_run, frozen, **stacks)

    @property
    def first(self) -> int:
        """The first position at which features are used."""
        return self.first_LxUxD.shape[1]

    def transcoder(self, layer: int) -> Dictionary:
        """A layer's transcoder, on the model's devices."""
        return self.dictionaries.load(layer, self.model.mesh)

    def skip(self, layer: int) -> jax.Array | None:
        """The skip path of a layer's transcoder [D, D]; None: there is none."""
        return None if self.skip_LxDxD is None else self.skip_LxDxD[layer]

    def filled(self, name: str, count: int, least: int) -> int:
        """The size to which arrays that follow the active features are filled up.

        It is that of an earlier prompt of this length and set, if that holds them and is at most twice as large: then
        the programs that were compiled for that prompt run this one, too. Otherwise an eighth is left for later ones.

        Args:
          name: of the arrays.
          count: how many there are.
          least: see ``padded``.
        """
        sizes, key = self.dictionaries.sizes, (name, self.stream_LxTxD.shape[1])
        if not count <= sizes.get(key, 0) <= 2 * count:
            sizes[key] = padded(count + count // 8, least)
        return sizes[key]

    def encoder_rows(self, chosen_F: np.ndarray) -> np.ndarray:
        """The directions that some of the active features read, fp32 [F, D]; each layer is read once."""
        return self.dictionaries.rows_of("W_enc", self.active.layer_A[chosen_F], self.active.feature_A[chosen_F])

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """The encoder's bias, and that of the norm which the transcoder reads behind, fp32 [F]."""
        own_F = super().constants(chosen_F)
        if self.read_bias_LxTxD is None:
            return own_F
        layer_F, position_F = self.active.layer_A[chosen_F], self.active.position_A[chosen_F]
        read_FxD = to_host(self.read_bias_LxTxD)[layer_F, position_F]
        return own_F + np.einsum("fd,fd->f", read_FxD, self.encoder_rows(chosen_F))


def first_used(config: DecoderConfig, ids_P: np.ndarray) -> int:
    """The first position of a prompt at which features are used."""
    start = CHAT_STARTS.get(config.family, ())
    return len(start) if start and tuple(ids_P[: len(start)].tolist()) == start else 1


def padded(count: int, least: int = 4) -> int:
    """The size to which tokens, features or rows are filled up, so that similar prompts share compiled programs.

    Args:
      count: how many there are.
      least: the size is a multiple of this, and at most a quarter larger where there are many.
    """
    step = max(least, (1 << count.bit_length()) >> 3)
    return max(-(-count // step), 1) * step


@functools.partial(jax.jit, static_argnums=0)
def embed(frozen: FrozenModel, params: decoder.Params, ids_T: jax.Array) -> jax.Array:
    """The stream entering layer 0, fp32 [T, D]: it stays fp32 in all layers, whatever the weights are."""
    x_TxD = decoder.embed(frozen.config, params, ids_T)
    return x_TxD.astype(jnp.promote_types(x_TxD.dtype, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def run_layer(
    frozen: FrozenModel, params: decoder.Params, layer: jax.Array, x_TxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A layer of the model.

    Args:
      frozen: static.
      layer: its number.
      x_TxD: the stream entering it.

    Returns:
      The stream leaving it, what its transcoder reads, and what its MLP adds, each [T, D].
    """
    seen = {}

    def hook(kind: str, value_TxD: jax.Array) -> jax.Array:
        seen[kind] = value_TxD
        return value_TxD

    tables = whole_prompts(frozen.config, len(x_TxD))
    next_TxD = decoder.run_layer(frozen.config, RELP, params, layer, x_TxD, tables, hook)
    return next_TxD, frozen.read(params, layer, seen), seen["mlp_out"]


@functools.partial(jax.jit, static_argnums=0)
def read_out(
    frozen: FrozenModel, params: decoder.Params, x_TxD: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The stream leaving the last layer at a position [D], and the logits there [V].

    Args:
      frozen: static.
      x_TxD: that stream at all positions.
      last: the position.
    """
    last_1xD = jax.lax.dynamic_slice_in_dim(x_TxD, last, 1)
    return last_1xD[0], decoder.unembed(frozen.config, params, last_1xD, RELP)[0]


@functools.partial(jax.jit, static_argnums=0)
def run_biases(
    frozen: FrozenModel, params: decoder.Params, stream_LxTxD: jax.Array, skip_LxDxD: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``FrozenModel.biases`` of all layers, both [L, T, D].

    Args:
      frozen: static.
      stream_LxTxD, skip_LxDxD: see ``Replacement``.
    """
    tables = whole_prompts(frozen.config, stream_LxTxD.shape[1])

    def one(_: None, part: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        layer, x_TxD, skip_DxD = part
        return None, frozen.biases(params, layer, tables, x_TxD, skip_DxD)

    layers = jnp.arange(frozen.config.n_layers)
    return jax.lax.scan(one, None, (layers, stream_LxTxD, skip_LxDxD))[1]
