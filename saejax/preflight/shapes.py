"""The models to check, known by their ``config.json`` alone: no weights are fetched or read."""

import dataclasses
from pathlib import Path
from typing import Any

from saejax.config import Configs
from saejax.errors import UserError
from saejax.files import fingerprint, read_foreign
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.settings import ModelConfig
from saejax.stages.preflight.settings import PreflightConfig

_EXPECTED = "a model's shape, a config.json of the hub"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    path: str  #: as it was given: a hub id, a folder, or a file of its shape
    config: DecoderConfig  #: its decoder
    has_weights: bool  #: whether the path leads to weights too, and not only to a shape


def read_shapes(configs: Configs) -> list[Shape]:
    """Return the models of ``--preflight.models``; where there are none, the model of ``--model.path``.

    Raises:
      UserError: one cannot be found or read, or is of an unsupported family.
    """
    return [
        _read(path, configs[ModelConfig]) for path in configs[PreflightConfig].models or (configs[ModelConfig].path,)
    ]


def identity(configs: Configs) -> str:
    """Return a hash that changes with the shapes, and with the weights where they are looked at."""
    shapes = read_shapes(configs)
    data: list[Any] = [dataclasses.asdict(shape) for shape in shapes]
    if configs[PreflightConfig].parity:
        model = configs[ModelConfig]
        data += [source.resolve(named(shape.path, model)).fingerprint for shape in shapes if shape.has_weights]
    return fingerprint(data)


def _read(path: str, model: ModelConfig) -> Shape:
    file = Path(path).expanduser()
    if file.suffix == ".json":
        return Shape(path, read_config(read_foreign(file, _EXPECTED), path), has_weights=False)
    try:
        config_file = source.find_config(named(path, model))
    except UserError as error:
        raise UserError(
            f"{error}; preflight also takes a file of the shape alone: --preflight.models=FILE.json"
        ) from None
    return Shape(path, read_config(read_foreign(config_file, _EXPECTED), str(config_file)), has_weights=True)


def named(path: str, model: ModelConfig) -> ModelConfig:
    """Return the settings for another model: a revision belongs to the model it was given for."""
    return dataclasses.replace(model, path=path, revision=model.revision if path == model.path else "main")
