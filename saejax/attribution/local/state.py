"""The state of a local replacement model: a prompt's streams, active features and errors.

At every layer and every position but the first,

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local import layers
from saejax.attribution.local.dictionaries import FeatureOutputs
from saejax.attribution.local.layers import RELP, FrozenModel
from saejax.attribution.local.prompt_run import Active, NothingActive, PromptRun, active_features
from saejax.attribution.local.readouts import padded, read_logits
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.layers import einsum
from saejax.parallel.collectives import to_host

# How chat templates begin whose tokens are all sinks: of Gemma 3 "<bos><start_of_turn>user" and a line end.
CHAT_STARTS = dict.fromkeys(("gemma3", "gemma3_text"), (2, 105, 2364, 107))


class LocalState(PromptRun):
    """The frozen state of one prompt; arrays are on the devices, in fp32.

    Args:
      model: the language model.
      transcoders: of all its layers.
      ids: token ids of the prompt, two at least.

    Attributes:
      frozen: the frozen layers.
      error_LxTxD: what transcoders do not explain; 0 at the first positions and at padding.
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
            raise NothingActive(f"no feature is used at the {which}, and the prompt has no further one")
        self.frozen = FrozenModel(model.config, model.params, transcoders.reads)
        # Padded, so that prompts of similar lengths share compiled programs.
        ids_T = np.pad(self.ids_P, (0, padded(len(self.ids_P)) - len(self.ids_P)))
        x_TxD = layers.embed(self.frozen, ids_T)
        self._run_layers(x_TxD, first)
        if any("_bias" in name for name in model.params):
            biases = layers.run_biases(self.frozen, self.stream_LxTxD)
            self.bias_LxTxD, self.read_bias_LxTxD = biases

    def _run_layers(self, x_TxD: jax.Array, first: int) -> None:
        model, transcoders, length = self.model, self.dictionaries, len(x_TxD)
        # Neither at the first positions, where the MLP's output stays whole, nor at padding.
        used_T = (np.arange(length) >= first) & (np.arange(length) < len(self.ids_P))
        outputs, active_by_layer = FeatureOutputs(transcoders, length), list[Active]()
        parts: dict[str, list[jax.Array]] = {}
        for layer in range(model.config.n_layers):
            # 1. The layer.
            leaving, read, out = layers.run_layer(self.frozen, "none", np.int32(layer), x_TxD[None])
            # 2. Its active features.
            encoder = transcoders.encoder(layer, model.mesh)
            active = active_features(encoder, layer, read[0], used_T)
            # 3. What they write, and the error.
            outputs.add(layer, active.position_A, active.feature_A, active.value_A)
            error_TxD, mlp_TxD = _errors(encoder, read[0], out[0], outputs.pop(layer), used_T)
            active_by_layer.append(active)
            values = dict(stream=x_TxD, error=error_TxD, first=mlp_TxD[:first], b_dec=encoder.b_dec_D[...])
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
        self.frozen = dataclasses.replace(self.frozen, skip_LxDxD=stacks.get("skip"))
        # First the model: where it is not finite itself, that is the cause to name.
        self.check()
        broken = np.flatnonzero(~to_host(jnp.isfinite(self.error_LxTxD).all(axis=(1, 2))))
        if len(broken):
            raise UserError(
                f"{transcoders.name}, layer {broken[0]}: what the transcoder gives is not finite: its file is damaged, "
                "fetch or train it again"
            )

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
) -> tuple[jax.Array, jax.Array]:
    """Return what features do not explain, 0 where they are not used, and the MLP's output less the skip path."""
    if encoder.config.skip:
        out_TxD = out_TxD - einsum("td,de->te", read_TxD, encoder.W_skip_DxD[...])
    error_TxD = out_TxD - encoder.b_dec_D[...][None] - written_TxD
    return jnp.where(used_T[:, None], error_TxD, jnp.zeros_like(error_TxD)), out_TxD
