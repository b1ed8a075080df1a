"""Results about trained dictionaries."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TrainedMember:
    """A dictionary of a stack."""

    name: str  #: among the members; "" for one alone
    site: str  #: that it reads
    target: str  #: that it rebuilds or predicts
    settings: Mapping[str, Any]  #: its own, such as seed, k and coefficients
    input_scale: float  #: by which activations are multiplied for training; folded into the dictionary
    output_scale: float  #: by which activations are multiplied for training; folded into the dictionary
    dead_fraction: float | None  #: of the features, those silent for an epoch or a shorter run; None: not trained here
    final: Mapping[str, float]  #: its metrics at the last recorded step, as in `metrics.jsonl`
