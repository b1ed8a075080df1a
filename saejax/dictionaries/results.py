"""Results about trained dictionaries."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Losses of the model on held-out text with a dictionary's output in place of its target."""

    kl: float  #: KL(clean || replaced), nats per token
    ce_recovered: float | None  #: share recovered against the mean; None where that does no harm


@dataclasses.dataclass(frozen=True)
class TrainedMember:
    """A dictionary of a stack."""

    name: str  #: name of the member; "" for a single dictionary
    site: str  #: site that it reads
    target: str  #: site that it reconstructs or predicts
    settings: Mapping[str, Any]  #: settings in which members may differ, such as seed, k and coefficients
    input_scale: float  #: factor of activations in training; folded into the dictionary
    output_scale: float  #: factor of targets in training; folded into the dictionary
    #: share of the features that were silent for an epoch (or a shorter run); None: not trained here
    dead_fraction: float | None
    final: Mapping[str, float]  #: metrics at the last recorded step, as in `metrics.jsonl`, without `held_out_`
    #: before and after fine-tuning through the model (`train.kl_steps`)
    finetuned: tuple[StandIn, StandIn] | None = None
