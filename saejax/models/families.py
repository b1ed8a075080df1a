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

# Fields of config.json that cannot change what a forward pass gives: bookkeeping, training, generation.
_INERT = frozenset(
    [
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    ]
)
_HF_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


class Fields:
    """The fields of a ``config.json``, taken one by one so that what is left over can be refused.

    Args:
      data: the parsed file.
      where: the file's name, for messages.
    """

    def __init__(self, data: Mapping[str, Any], where: str):
        self.where = where
        self._left = {name: value for name, value in data.items() if name not in _INERT}

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Removes a field and returns it, or ``default`` where it is absent or null. A wrong type is an error."""
        value = self._left.pop(name, None)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where} has no field {name!r}: expected it in a config of this family")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise UserError(f"{self.where}: field {name!r} is {value!r}, expected {names}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """Like ``take``, for a whole number above 0."""
        value = self.take(name, int, default)
        if value < 1:
            raise UserError(f"{self.where}: field {name!r} is {value}, expected at least 1")
        return value

    def head_width(self, name: str, d_model: int, n_heads: int) -> int:
        """The width of a head: the field, or ``d_model / n_heads`` where it is absent."""
        if self._left.get(name) is None and d_model % n_heads:
            raise UserError(f"{self.where}: {n_heads} heads do not divide the width {d_model}, and {name!r} is absent")
        return self.size(name, d_model // n_heads)

    def expect(self, name: str, value: Any) -> None:
        """Takes a field that may be absent, null or ``value``; anything else is refused."""
        found = self._left.pop(name, None)
        if found is not None and found != value:
            raise self.refuse(name, found, repr(value))

    def activation(self, name: str) -> str:
        """The decoder's name of an activation function."""
        value = self.take(name, str)
        if value not in _HF_ACTIVATIONS:
            raise self.refuse(name, value, f"one of {', '.join(sorted(_HF_ACTIVATIONS))}")
        return _HF_ACTIVATIONS[value]

    def rope_theta(self, default: float) -> float:
        """The base of the rotary embedding, from where transformers 4 or 5 writes it; other kinds are refused."""
        old, new = (dict(self._left.pop(name, None) or {}) for name in ("rope_scaling", "rope_parameters"))
        if old and new and old != new:
            raise UserError(f"{self.where}: fields 'rope_scaling' and 'rope_parameters' contradict each other")
        rope = new or old
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        if kind != "default":
            raise self.refuse("rope_parameters.rope_type", kind, "'default'")
        theta = float(self.take("rope_theta", (int, float), rope.get("rope_theta", default)))
        if float(rope.pop("rope_theta", theta)) != theta:
            raise UserError(f"{self.where}: 'rope_theta' and 'rope_parameters.rope_theta' contradict each other")
        if rope:
            raise self.refuse("rope_parameters", sorted(rope), "rope_type and rope_theta only")
        return theta

    def refuse(self, name: str, value: Any, expected: str) -> UserError:
        """The error for a field whose value the decoder cannot honour."""
        return UserError(f"{self.where}: {name} {value!r} is not supported, expected {expected}: use another model")

    def done(self) -> None:
        """A ``UserError`` if any field was not taken and is not null."""
        left = sorted(name for name, value in self._left.items() if value is not None)
        if left:
            raise UserError(
                f"{self.where} has fields that saejax does not know and that could change the result: "
                f"{', '.join(left)}: use another model, or remove them if they are without effect"
            )


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
