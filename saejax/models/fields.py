"""The fields of a model's ``config.json``: each one is taken, known to be without effect, or refused by name."""

from collections.abc import Mapping
from typing import Any

from saejax.errors import UserError

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
