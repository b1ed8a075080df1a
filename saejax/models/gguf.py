"""GGUF files: de-quantised once by transformers, and kept in the hub's format.

A GGUF file leaves out some of a model's settings, and transformers leaves out some of the file's, without a word. So
what it made of a file is compared with the file: every setting that it did not read has to agree, every tensor has to
have been used, and nothing may have been drawn at random.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.models.identity import content_sha256
from saejax.models.model_cache import cached_model, save_pretrained

_CONVERSION = 6  # raise it when the conversion changes, so that old caches are left behind
# Settings of a file, below its architecture, that cannot change the result: sizes that the tensors show, or facts of
# the training.
_INERT = {"vocab_size", "feed_forward_length", "tensor_data_layout", "rope.scaling.finetuned"}
# The largest Gemmas scale attention scores by another width than their heads', which no file says.
_OTHER_SCALE = {("gemma2", 46), ("gemma3", 62)}
# Rules by which byte-level vocabularies cut text ("tokenizer.ggml.pre") that transformers takes for GPT-2's without a
# word: those that are the same, and those that set each digit apart before.
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
# Rules of tokenizers that bring text into Unicode's form NFC before they cut it; transformers leaves that out.
_COMPOSED = {"qwen2", "qwen35", "deepseek-r1-qwen", "command-r", "olmo", "mpt"}
_RULE = "tokenizer.ggml.pre"
_ONE_AT_A_TIME = threading.Lock()  # conversions, which change the package gguf while they run


def dequantise(gguf: Path) -> Path:
    """Return the folder of a GGUF file's model, from the cache or made now.

    Raises:
      UserError: transformers cannot read the file, or not all of it; or the cache cannot be written.
    """
    name = f"{gguf.stem}-{content_sha256(gguf)[:16]}-{_CONVERSION}"
    return cached_model(name, gguf.name, lambda folder: _convert(gguf, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file in the hub's format, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()
    where = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    try:
        with _parse_once():
            settings, tensors = _read(gguf)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype="float32", output_loading_info=True
            )
            _check_settings(gguf, settings, model.config)
            _check_tensors(gguf, tensors, model, loaded["missing_keys"])
            tokenizer = AutoTokenizer.from_pretrained(**where)
            _cut_as_trained(gguf, tokenizer)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the parser raise anything
        raise UserError(f"{gguf} cannot be read by transformers ({error}): expected a whole GGUF model") from error
    # transformers refuses to save what it believes to be quantised; these weights no longer are.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    save_pretrained(model, tokenizer, folder)


@contextlib.contextmanager
def _parse_once() -> Iterator[None]:
    """Let transformers parse a file once, not three times, and list the names of tensors once, not once a module."""
    import gguf

    with _ONE_AT_A_TIME:

        class Reader(gguf.GGUFReader):
            """Reads a file as plain arrays: each of a million slices of a ``np.memmap`` costs three times as much."""

            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        parsed = functools.cache(lambda place: Reader(place))
        shared = dict(
            # transformers gives the path as text
            GGUFReader=lambda path, *mode: parsed(Path(path)),
            get_tensor_name_map=functools.cache(gguf.get_tensor_name_map),
        )
        before = {name: vars(gguf)[name] for name in shared}
        vars(gguf).update(shared)
        try:
            yield
        finally:
            vars(gguf).update(before)


def _read(gguf: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings of the architecture that transformers does not read, and the size of every tensor.

    Raises:
      UserError: transformers does not read this architecture.
    """
    from gguf import GGUFReader
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    reader = GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    not_models = ("general", "tokenizer")
    architectures = {_plain(name): keys for name, keys in GGUF_CONFIG_MAPPING.items() if name not in not_models}
    if _plain(architecture) not in architectures:
        raise UserError(
            f"{gguf} holds a model of the architecture {architecture!r}, which transformers cannot read in this "
            f"format, expected one of {', '.join(sorted(architectures))}: use the model's safetensors"
        )
    prefix = f"{architecture}."
    settings = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    if (architecture, settings.get("block_count")) in _OTHER_SCALE:
        raise UserError(f"{gguf} does not say how attention scores are scaled: use the model's safetensors")
    unread = {name: value for name, value in settings.items() if not architectures[_plain(architecture)].get(name)}
    return unread, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}


def _plain(architecture: str) -> str:
    """Return a name without what files and transformers write differently: qwen2moe, qwen2_moe."""
    return architecture.replace("_", "").replace("-", "")


def _cut_as_trained(gguf: Path, tokenizer: Any) -> None:
    """Give a tokenizer the rule by which its file says that text is cut, and what the rule's models do before that.

    Raises:
      UserError: neither transformers nor saejax knows the rule.
    """
    from gguf import GGUFReader
    from tokenizers import normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = GGUFReader(gguf).fields
    kind, rule = (fields[name].contents() if name in fields else None for name in ("tokenizer.ggml.model", _RULE))
    if kind == "gpt2" and rule in _COMPOSED:  # a file says only how text is cut, and llama.cpp does not compose either
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if kind != "gpt2" or rule in _AS_GPT2 or rule in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if rule not in _DIGITS_APART:
        raise UserError(
            f"{gguf} cuts text into tokens by a rule that transformers does not know ({_RULE} is {rule!r}): use the "
            "model's safetensors"
        )
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _check_settings(gguf: Path, settings: dict[str, Any], config: Any) -> None:
    """Raise a ``UserError`` if a setting that transformers did not read is not what its configuration says."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    agreed = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head) | {
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.causal": True,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.scaling.type": "none",
    }
    # A mark of its own, as a setting that is switched off is None.
    missing = object()
    wrong = [
        f"{name} = {value}"
        for name, value in settings.items()
        if name not in _INERT and agreed.get(name, missing) != value
    ]
    if wrong:
        raise UserError(
            f"{gguf} has settings that transformers does not read and that change the result: {', '.join(wrong)}: use "
            "the model's safetensors"
        )


def _check_tensors(gguf: Path, tensors: dict[str, int], model: Any, drawn: set[str]) -> None:
    """Raise a ``UserError`` if a tensor of the file was not used, or a parameter was not in the file."""
    if drawn:
        raise UserError(f"{gguf} lacks the weights {', '.join(sorted(drawn)[:5])}: expected a whole GGUF model")
    used = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once
    if used != sum(tensors.values()):
        sizes = ", ".join(name for name in tensors if name.startswith("rope_") or name.endswith(".bias")) or "unknown"
        raise UserError(
            f"{gguf} holds {sum(tensors.values()):,} numbers, of which transformers reads {used:,} (possibly left out: "
            f"{sizes}): use the model's safetensors"
        )
