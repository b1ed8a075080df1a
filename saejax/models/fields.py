"""The fields of a model's ``config.json``: fields that change the computation are read, or refused by name.

All other fields are without effect. Where one of them has a name that is not known for that, the model is compared with
transformers when it is first loaded (``parity``).
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from saejax.errors import UserError

# Names of fields that do not change a forward pass: bookkeeping, training, generation, heads for other tasks.
_WITHOUT_EFFECT = tuple(
    """
    _* *_token_id *_token_index *dropout* *pdrop *initializer* summary_* output_* return_* *num_beam* *label* *penalty
    *ngram_size num_return_sequences forced_* *suppress_tokens max_length min_length max_new_tokens do_sample
    early_stopping temperature top_k top_p typical_p bad_words_ids remove_invalid_values cache_implementation use_cache
    architectures auto_map model_type dtype torch_dtype torchscript transformers_version transformers.js_config tf_*
    use_bfloat16 tokenizer_class task_specific_params problem_type finetuning_task prefix language* license unsloth_*
    chunk_size_feed_forward keys_to_ignore_at_inference is_decoder is_llama_config tie_encoder_decoder
    tie_last_hidden_states gradient_checkpointing pretraining_tp n_special predict_special_tokens n_ctx
    max_sequence_length custom_pipelines
    """.split()  # noqa: SIM905
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
    """The fields of a ``config.json``, with a record of the fields that were read.

    Args:
      data: the parsed file, or an object in it.
      where: the file's name, for messages.
      path: what names in messages start with, such as "rope_parameters." for an object in the file.
      defaults: values of fields that the file lacks.
    """

    def __init__(self, data: Mapping[str, Any], where: str, path: str = "", defaults: Mapping[str, Any] | None = None):
        self.where, self._path, self._own, self._data = where, path, data, {**(defaults or {}), **data}
        self._known: set[str] = set()
        self._parts: list[Fields] = []

    def __contains__(self, name: str) -> bool:
        """Return whether the field is there and is not null."""
        return self._data.get(name) is not None

    def unread(self) -> list[str]:
        """Return the names of fields of the file that are not null, were not read and could have an effect."""
        unread = [name for name in self._own if name in self and name not in self._known]
        effective = [
            self._path + name
            for name in unread
            if not any(fnmatch.fnmatch(name, pattern) for pattern in _WITHOUT_EFFECT)
        ]
        return sorted(effective + [name for part in self._parts for name in part.unread()])

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field, or ``default`` if it is null; an error if that is None too, or if the type is wrong."""
        value = self._look(name, kind)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where} has no field {self._path + name!r}: expected it in a config of this family")
        return value

    def _look(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Return a field of a type, or None."""
        self._known.add(name)
        value = self._data.get(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # In Python a bool is an int, and in a config it would be a mistake.
        if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
            return value
        names = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{self.where}: field {self._path + name!r} is {value!r}, expected {names}")

    def size(self, name: str, default: int | None = None) -> int:
        """Return a field as ``take`` does, for a whole number above 0."""
        return self._positive(name, self.take(name, int, default), "at least 1")

    def size_or_null(self, name: str) -> int | None:
        """Return a field as ``size`` does, but None where it is absent or null."""
        value = self._look(name, int)
        return value if value is None else self._positive(name, value, "at least 1")

    def number(self, name: str, default: float | None = None) -> float:
        """Return a field as ``take`` does, for a number above 0."""
        return float(self._positive(name, self.take(name, (int, float), default), "above 0"))

    def number_or_null(self, name: str) -> float | None:
        """Return a field as ``number`` does, but None where it is absent or null."""
        value = self._look(name, (int, float))
        return value if value is None else float(self._positive(name, value, "above 0"))

    def _positive(self, name: str, value: Any, expected: str) -> Any:
        """Return the value, if it is finite and above 0."""
        if not 0 < value < float("inf"):
            raise UserError(f"{self.where}: field {self._path + name!r} is {value}, expected {expected}")
        return value

    def quotient(self, whole: str, parts: str) -> int:
        """Return the field ``whole`` divided by the field ``parts``; a ``UserError`` if that leaves a remainder."""
        if self.size(whole) % self.size(parts):
            raise UserError(
                f"{self.where}: {self._path + parts!r} ({self.size(parts)}) does not divide {self._path + whole!r} "
                f"({self.size(whole)}), and the width of a head is not given"
            )
        return self.size(whole) // self.size(parts)

    def part(self, name: str, defaults: Mapping[str, Any] | None = None) -> "Fields":
        """Return the fields of an object in this one, none where it is absent or null, on top of ``defaults``."""
        part = Fields(self.take(name, dict, {}), self.where, f"{self._path}{name}.", defaults)
        self._parts.append(part)
        return part

    def ignore(self, *names: str) -> None:
        """Record fields that have no effect in this family."""
        self._known.update(names)

    def expect(self, name: str, value: Any) -> None:
        """Refuse a field that is neither absent, null nor ``value``."""
        self._known.add(name)
        actual = self._data.get(name)
        if actual is not None and actual != value:
            raise self.refuse(name, actual, repr(value))

    def first_number(self, name: str, default: float, fallbacks: Iterable[tuple["Fields", str]] = ()) -> float:
        """Return a number of this object, else the first that another object has, else ``default``."""
        numbers = [fields.number(key) for fields, key in [(self, name), *fallbacks] if key in fields]
        return numbers[0] if numbers else default

    def activation(self, name: str, default: str | None = None) -> str:
        """Return the decoder's name of an activation function, which a field holds or else ``default``."""
        value = self.take(name, str, default)
        if value not in _HF_ACTIVATIONS:
            raise self.refuse(name, value, f"one of {', '.join(sorted(_HF_ACTIVATIONS))}")
        return _HF_ACTIVATIONS[value]

    def refuse(self, name: str, value: Any, expected: str) -> UserError:
        """Return the error for a field whose value the decoder cannot honour; ``expected`` says what it can."""
        return UserError(
            f"{self.where}: {self._path + name} {value!r} is not supported, expected {expected}: run it in PyTorch "
            "(--model.backend=torch), or use another model"
        )

    def contradiction(self, *names: str) -> UserError:
        """Return the error for fields that cannot all be true."""
        return UserError(f"{self.where}: fields {' and '.join(names)} contradict each other: use a whole config.json")
