"""Identities of models: hashes of the files that their results depend on, whatever the folder."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from saejax.files import file_sha256, write_text
from saejax.files import fingerprint as hash_json
from saejax.models.checkpoint import weight_files

SETTINGS = (  # the files of a model, apart from its weights
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
    "*.model",
    "*.jinja",
)
_GENERATION, _OF_GENERATION = "generation_config.json", "eos_token_id"  # the only field of it that is read
# Where the model was loaded from before it was saved. Other fields of config.json stay in the hash: transformers reads
# even its own version, to choose how a tokenizer cuts texts.
_ORIGIN = "_name_or_path"
_HASHED_AT_ONCE = 1 << 20  # bytes up to which a file is hashed each time
_LFS_BLOB, _HEXADECIMAL = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16,64}")


def cache_folder() -> Path:
    """Return the folder for what saejax derives from models: ``$SAEJAX_CACHE``, by default ``~/.cache/saejax``."""
    return Path(os.environ.get("SAEJAX_CACHE") or Path.home() / ".cache" / "saejax").expanduser()


def fingerprint(folder: Path) -> str:
    """Return a hash, 16 hexadecimal digits, of a model's configuration, tokenizer and weights.

    Of ``generation_config.json`` only the ids that end a text count, of ``config.json`` all but the model's origin.
    """
    return _digest([*setting_files(folder), *weight_files(folder)])


def settings_fingerprint(folder: Path) -> str:
    """Return a hash like ``fingerprint`` without the weights."""
    return _digest(setting_files(folder))


def setting_files(folder: Path) -> list[Path]:
    """Return the files of a model's configuration and tokenizer."""
    return sorted({path for pattern in SETTINGS for path in folder.glob(pattern)})


def _digest(files: list[Path]) -> str:
    """Return a hash, 16 hexadecimal digits, of the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        if content := _hash_what_is_read(path):
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def _hash_what_is_read(path: Path) -> str:
    """Return a hash of what is read of a model's file; "" if that is nothing."""
    if path.name not in (_GENERATION, "config.json"):
        return content_sha256(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        ends, others = fields.get(_OF_GENERATION), {name: fields[name] for name in fields if name != _ORIGIN}
    except (ValueError, AttributeError, RecursionError):  # refused where it is used
        return content_sha256(path)
    if path.name == _GENERATION:
        return "" if ends is None else hash_json(ends)
    return hash_json(others)


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits.

    Large files are read once: the hash is kept in the cache folder under path, size, time of change and inode. Large
    files of the hub are stored under their hash.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _LFS_BLOB.fullmatch(real.name):
        return real.name
    return keep_hash(real, "", lambda: file_sha256(real))


def keep_hash(path: Path, kind: str, compute: Callable[[], str]) -> str:
    """Return a hash of a file, which for a large file is computed once and then kept in the cache folder.

    It is kept under path, size, both times of change and inode: of a file that was changed or replaced, at least one
    differs. Programs can set the time of the content back, as archives do when they are unpacked, not the inode's.

    Args:
      path: the file.
      kind: distinguishes hashes of one file; "" for the hash of its bytes.
      compute: returns the hash, 16 to 64 hexadecimal digits.
    """
    real = path.resolve()
    stat = real.stat()
    if stat.st_size <= _HASHED_AT_ONCE:
        return compute()
    marks = (real, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    key = " ".join([*map(str, marks), *([kind] if kind else [])])
    kept = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        cached = kept.read_text(encoding="ascii").strip()
        if _HEXADECIMAL.fullmatch(cached):
            return cached
    except (OSError, UnicodeDecodeError):
        pass  # not hashed yet, or damaged
    content = compute()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, content)
    except OSError as error:
        logging.getLogger(__name__).warning("the hash of %s cannot be kept (%s): it will be read again", path, error)
    return content
