"""The fields of a model's ``config.json``: each one is taken, known to be without effect, or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from saejax.errors import UserError

# Fields of config.json that cannot change what a forward pass gives: bookkeeping, training, generation, and heads for
# other tasks than predicting the next token.
_INERT = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "do_sample",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "model_type",
        "n_special",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "predict_special_tokens",
        "pretraining_tp",
        "problem_type",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
_HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Fields:
    """The fields of a ``config.json``; those that nobody asked for are refused in the end.

    Args:
      data: the parsed file, or an object in it.
      where: the file's name, for messages.
      path: what names in messages start with, such as "rope_parameters." for an object in the file.
    """

    def __init__(self, data: Mapping[str, Any], where: str, path: str = ""):
        self.where, self._path = where, path
        self._data = {name: value for name, value in data.items() if name not in _INERT}
        self._known: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and is not null."""
        return self._data.get(name) is not None

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A field, or ``default`` where it is absent or null; an error if that is None too, or if the type is wrong."""
        value = self._look(name, kind)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where} has no field {self._path + name!r}: expected it in a config of this family")
        return value

    def _look(self, name: str, kind: type | tuple[type, ...]) -> Any:
        self._known.add(name)
        value = self._data.get(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
            return value
        names = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{self.where}: field {self._path + name!r} is {value!r}, expected {names}")

    def size(self, name: str, default: int | None = None) -> int:
        """As ``take``, for a whole number above 0."""
        return self._positive(name, self.take(name, int, default), "at least 1")

    def size_or_null(self, name: str) -> int | None:
        """Like ``size``, but None where the field is absent or null."""
        value = self._look(name, int)
        return value if value is None else self._positive(name, value, "at least 1")

    def number(self, name: str, default: float | None = None) -> float:
        """As ``take``, for a number above 0."""
        return float(self._positive(name, self.take(name, (int, float), default), "above 0"))

    def number_or_null(self, name: str) -> float | None:
        """Like ``number``, but None where the field is absent or null."""
        value = self._look(name, (int, float))
        return value if value is None else float(self._positive(name, value, "above 0"))

    def _positive(self, name: str, value: Any, expected: str) -> Any:
        if not 0 < value < float("inf"):
            raise UserError(f"{self.where}: field {self._path + name!r} is {value}, expected {expected}")
        return value

    def quotient(self, whole: str, parts: str) -> int:
        """The field ``whole`` divided by the field ``parts``; a ``UserError`` if that leaves a remainder."""
        if self.size(whole) % self.size(parts):
            raise UserError(
                f"{self.where}: {self._path + parts!r} ({self.size(parts)}) does not divide {self._path + whole!r} "
                f"({self.size(whole)}), and the width of a head is not given"
            )
        return self.size(whole) // self.size(parts)

    def part(self, name: str, defaults: Mapping[str, Any] | None = None) -> "Fields":
        """The fields of an object in this one, none where it is absent or null, on top of ``defaults``."""
        return Fields({**(defaults or {}), **self.take(name, dict, {})}, self.where, f"{self._path}{name}.")

    def ignore(self, *names: str) -> None:
        """Fields without effect in this family."""
        self._known.update(names)

    def expect(self, name: str, value: Any) -> None:
        """A field that may be absent, null or ``value``; anything else is refused."""
        self._known.add(name)
        found = self._data.get(name)
        if found is not None and found != value:
            raise self.refuse(name, found, repr(value))

    def agreeing(self, others: Sequence[tuple["Fields", str]], name: str, default: float) -> float:
        """One number that this object and others may hold, by their names for it, or ``default``.

        Raises:
          UserError: they differ.
        """
        found = {fields._path + own: fields.number(own) for fields, own in [(self, name), *others] if own in fields}
        if len(set(found.values())) > 1:
            raise self.contradiction(*(f"{own} ({value:g})" for own, value in found.items()))
        return next(iter(found.values()), default)

    def activation(self, name: str, default: str | None = None) -> str:
        """The decoder's name of an activation function, which a field holds or else ``default``."""
        value = self.take(name, str, default)
        if value not in _HF_ACTIVATIONS:
            raise self.refuse(name, value, f"one of {', '.join(sorted(_HF_ACTIVATIONS))}")
        return _HF_ACTIVATIONS[value]

    def refuse(self, name: str, value: Any, expected: str) -> UserError:
        """The error for a field whose value the decoder cannot honour; ``expected`` says what it can, in words."""
        return UserError(
            f"{self.where}: {self._path + name} {value!r} is not supported, expected {expected}: use another model"
        )

    def contradiction(self, *names: str) -> UserError:
        """The error for fields that cannot all be true."""
        return UserError(f"{self.where}: fields {' and '.join(names)} contradict each other: use a whole config.json")

    def done(self) -> None:
        """A ``UserError`` if there are fields that are not null and that nobody asked for."""
        left = sorted(self._path + name for name in self._data if name in self and name not in self._known)
        if left:
            raise UserError(
                f"{self.where} has fields that saejax does not know and that could change the result: "
                f"{', '.join(left)}: use another model, or remove them if they are without effect"
            )
