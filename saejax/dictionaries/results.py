"""What is said of trained dictionaries, and results of the stage ``export``."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TrainedMember:
    """A dictionary of a stack.

    Attributes:
      name: among the members; "" for one alone.
      site: that it reads.
      target: that it rebuilds or predicts.
      settings: its own, such as seed, k and coefficients.
      input_scale, output_scale: by which activations are multiplied for training; folded into the dictionary.
      dead_fraction: of the features, those silent for an epoch, or for the whole run if it was shorter.
      final: its metrics at the last recorded step, as in `metrics.jsonl`.
    """

    name: str
    site: str
    target: str
    settings: Mapping[str, Any]
    input_scale: float
    output_scale: float
    dead_fraction: float
    final: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ExportedMember:
    """A dictionary in the other format.

    Attributes:
      name, site, target: as trained.
      folder: that holds it.
    """

    name: str
    site: str
    target: str
    folder: str


@dataclasses.dataclass(frozen=True)
class ExportResults:
    """A train unit in the format of another tool.

    Attributes:
      format: of `export.format`.
      members: each with its folder.
    """

    format: str
    members: tuple[ExportedMember, ...]
