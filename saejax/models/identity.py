"""Fingerprints of model files."""

import hashlib
from pathlib import Path

from saejax.files import file_sha256
from saejax.models.checkpoint import safetensors_files

MARK = "saejax.json"  # left in a folder that saejax made; not part of the model
_WHOLE_BELOW, _SAMPLES, _SAMPLE_BYTES = 1 << 24, 256, 4096


def fingerprint(folder: Path) -> str:
    """A hash, 16 hexadecimal digits, of what a model's results depend on: configuration, tokenizer and weights."""
    files = {path for pattern in ("*.json", "*.model", "*.txt", "*.jinja") for path in folder.glob(pattern)}
    files = {path for path in files if path.name != MARK} | set(safetensors_files(folder))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name} {path.stat().st_size} {content(path)}\n".encode())
    return digest.hexdigest()[:16]


def content(path: Path) -> str:
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
