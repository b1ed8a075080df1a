"""Writes cross-layer transcoders as circuit-tracer's folder, which ``cross_layer`` reads and ``train`` leaves.

``config.yaml`` also has a key ``saejax``, which circuit-tracer does not read: the model's revision and fingerprint, of
each layer the norm above which what it reads is an attention sink, and a stamp that all files of the set have.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import yaml

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import circuit_tracer_settings as description
from saejax.dictionaries.formats import tensors
from saejax.dictionaries.formats.cross_layer import ENCODERS, FACTS, KIND
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.files import write_text
from saejax.parallel.collectives import is_first_process

DECODERS = "W_dec_*.safetensors"


def save(folder: Path, layers: int, load: Callable[[int], tuple[Dictionary, np.ndarray]]) -> None:
    """Writes a set, a layer at a time; it appears whole or not at all. All processes of a run must call it.

    Args:
      folder: made if missing; ``config.yaml`` is written last.
      layers: how many, from 0.
      load: gives a layer, "standard" or "jumprelu", without a skip path; and what its features write to each layer from
        their own on, [F, layers - layer, D].

    Raises:
      UserError: the folder holds a set already, or circuit-tracer has no such transcoders.
    """
    found = (load(layer) for layer in range(layers))
    if not is_first_process():
        for _ in found:  # its arrays are on the devices of all
            pass
        return
    configs: list[DictionaryConfig] = []
    stamp = ""
    with tensors.whole_folder(folder, description.DESCRIPTION, ENCODERS, DECODERS) as beside:
        for layer, (one, writes_FxXxD) in enumerate(found):
            one, config = rescale.uncentred(one), one.config
            if config.kind not in ("standard", "jumprelu") or config.skip:
                raise UserError(f"circuit-tracer's cross-layer folders hold no {config.kind} layers, or skip paths")
            arrays, _ = tensors.host_arrays(one)
            named = {name: arrays[ours] for name, ours in tensors.plain_names(config).items() if name != "W_dec"}
            named["W_enc"] = named["W_enc"].T
            stamp = stamp or _stamp(config, named)
            encoder = {f"{name}_{layer}": array for name, array in named.items()}
            tensors.write(beside / ENCODERS.replace("*", str(layer)), encoder, stamp)
            decoder = {f"W_dec_{layer}": writes_FxXxD.astype(named["W_enc"].dtype)}
            tensors.write(beside / DECODERS.replace("*", str(layer)), decoder, stamp)
            configs.append(config)
        description.check([dataclasses.replace(config, max_norm=0.0) for config in configs])
        own = dict(revision=configs[0].revision, fingerprint=configs[0].fingerprint)
        settings = description.describe(configs[0]) | dict(model_kind=KIND)
        settings |= {FACTS: own | dict(stamp=stamp, max_norms=[config.max_norm for config in configs])}
        write_text(beside / description.DESCRIPTION, yaml.safe_dump(settings, allow_unicode=True))


def _stamp(config: DictionaryConfig, first: Mapping[str, np.ndarray]) -> str:
    """Of a set, from its model and the biases of its first layer: no two trainings share them."""
    told = hashlib.sha256(config.fingerprint.encode())
    for name in sorted(first):
        told.update(first[name].tobytes() if first[name].ndim == 1 else b"")
    return told.hexdigest()[:16]


def clear(folder: Path) -> None:
    """Removes a set, its description first."""
    for pattern in (description.DESCRIPTION, ENCODERS, DECODERS):
        for path in folder.glob(pattern):
            path.unlink()


def copy(folder: Path, to: Path) -> None:
    """Copies a set; it appears whole or not at all.

    Raises:
      UserError: one is there already.
    """
    with tensors.whole_folder(to, description.DESCRIPTION, ENCODERS, DECODERS) as beside:
        for pattern in (ENCODERS, DECODERS, description.DESCRIPTION):
            for path in folder.glob(pattern):
                shutil.copyfile(path, beside / path.name)
