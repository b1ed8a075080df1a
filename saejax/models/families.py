"""The families of models the decoder can run: how each writes its configuration and names its weights.

A family is one entry of ``FAMILIES``, under the ``model_type`` of its ``config.json``. Its reader takes every field
that changes the result and refuses what it does not know; its weight table says where every parameter is found.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.fields import Fields


def _same(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return _expect(tensor, shape)


def _vector(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A bias, whose heads and their width are one dimension."""
    return _expect(tensor, (math.prod(shape),)).reshape(shape)


def _linear(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A torch Linear, [out, in]; the parameter is [in, out], where out may be heads by width."""
    return _expect(tensor, (math.prod(shape[1:]), shape[0])).T.reshape(shape)


def _linear_of_heads(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A torch Linear, [out, in]; the parameter is [heads, width, out]."""
    return _expect(tensor, (shape[2], shape[0] * shape[1])).T.reshape(shape)


def _expect(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape:
        raise ValueError(f"has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a parameter, or its slice of one layer, is found in a checkpoint.

    Attributes:
      name: the tensor's name; "{}" stands for the layer.
      view: gives that tensor the parameter's shape without copying; a ``ValueError`` if the tensor has another shape
        than it should.
    """

    name: str
    view: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = _same


@dataclasses.dataclass(frozen=True)
class Family:
    """How one ``model_type`` is read.

    Attributes:
      read_config: from the fields of its ``config.json``.
      weights: the place of every parameter of ``decoder.parameter_table``.
      ignored: tensors that older checkpoints carry and nothing needs ("{}" stands for the layer).
    """

    read_config: Callable[[Fields], DecoderConfig]
    weights: Mapping[str, Weight]
    ignored: tuple[str, ...] = ()


def _read_llama(fields: Fields) -> DecoderConfig:
    d_model, n_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    fields.expect("rope_interleaved", False)
    return DecoderConfig(
        family="llama",
        n_layers=fields.size("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=fields.size("num_key_value_heads", n_heads),
        d_head=fields.head_width("head_dim", d_model, n_heads),
        d_mlp=fields.size("intermediate_size"),
        vocab=fields.size("vocab_size"),
        context=fields.size("max_position_embeddings", 2048),
        norm_eps=float(fields.take("rms_norm_eps", (int, float), 1e-6)),
        activation=fields.activation("hidden_act"),
        rope_theta=fields.rope_theta(10_000.0),
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False),
        tied=fields.take("tie_word_embeddings", bool, False),
    )


_LLAMA_WEIGHTS = {
    "embed_VxD": Weight("model.embed_tokens.weight"),
    "final_norm_D": Weight("model.norm.weight"),
    "unembed_DxV": Weight("lm_head.weight", _linear),
    "layers.attn_norm_D": Weight("model.layers.{}.input_layernorm.weight"),
    "layers.q_DxHxK": Weight("model.layers.{}.self_attn.q_proj.weight", _linear),
    "layers.k_DxNxK": Weight("model.layers.{}.self_attn.k_proj.weight", _linear),
    "layers.v_DxNxK": Weight("model.layers.{}.self_attn.v_proj.weight", _linear),
    "layers.o_HxKxD": Weight("model.layers.{}.self_attn.o_proj.weight", _linear_of_heads),
    "layers.q_bias_HxK": Weight("model.layers.{}.self_attn.q_proj.bias", _vector),
    "layers.k_bias_NxK": Weight("model.layers.{}.self_attn.k_proj.bias", _vector),
    "layers.v_bias_NxK": Weight("model.layers.{}.self_attn.v_proj.bias", _vector),
    "layers.o_bias_D": Weight("model.layers.{}.self_attn.o_proj.bias", _vector),
    "layers.mlp_norm_D": Weight("model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate_DxF": Weight("model.layers.{}.mlp.gate_proj.weight", _linear),
    "layers.up_DxF": Weight("model.layers.{}.mlp.up_proj.weight", _linear),
    "layers.down_FxD": Weight("model.layers.{}.mlp.down_proj.weight", _linear),
    "layers.gate_bias_F": Weight("model.layers.{}.mlp.gate_proj.bias", _vector),
    "layers.up_bias_F": Weight("model.layers.{}.mlp.up_proj.bias", _vector),
    "layers.down_bias_D": Weight("model.layers.{}.mlp.down_proj.bias", _vector),
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_read_llama, _LLAMA_WEIGHTS, ignored=("model.layers.{}.self_attn.rotary_emb.inv_freq",)),
}


def check_family(data: Mapping[str, Any], where: str) -> str:
    """The family of a parsed ``config.json``; a ``UserError`` if the decoder does not run it."""
    family = data.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where}: models of the family {family!r} are not supported, expected one of {', '.join(FAMILIES)}: "
            "use another model"
        )
    return family


def read_config(data: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder's configuration from a parsed ``config.json``.

    Args:
      data: the parsed file.
      where: its name, for messages.

    Raises:
      UserError: the family is not supported, or a field is unknown, missing, contradictory or of an unsupported value.
    """
    family = check_family(data, where)
    if data.get("quantization_config"):
        raise UserError(f"{where}: the weights are quantised ('quantization_config'): use the unquantised model")
    fields = Fields(data, where)
    config = FAMILIES[family].read_config(fields)
    fields.done()
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where}: {config.n_heads} attention heads are not a multiple of {config.n_kv_heads} key-value heads"
        )
    if config.d_head % 2:
        raise UserError(f"{where}: heads are {config.d_head} wide, but the rotary embedding needs an even width")
    return config
