"""Settings of preflight."""

import dataclasses

from saejax.config import Config, Place, setting
from saejax.models.parity import TOLERANCE


@dataclasses.dataclass(frozen=True)
class PreflightConfig(Config):
    """Checks before anything runs."""

    models: tuple[Place, ...] = setting(
        (),
        "models to check: hub ids (only config.json is downloaded), folders, or .json files of a model's shape such as "
        "configs/shapes/llama-3-8b.json; empty: the model of --model.path",
    )
    topology: str = setting(
        "",
        "devices to compile for: a TPU slice such as v5e:2x4 (needs the package libtpu, but no TPU), or nodes of GPUs "
        "such as a100-40:8, a100-80:8, h100:8 or h100:4x8 (simulated by CPU devices; not in a pipeline); empty: the "
        "devices of this machine",
    )
    transcoder_features: int = setting(
        0,
        "features per layer of a set of transcoders on the hub, so that what reads one can be planned before it is "
        "downloaded; 0: unknown, and the hub is asked",
        low=0,
    )
    parity: bool = setting(
        False,
        "compare the decoder with transformers, in --model.dtype; a relative error of a site or of the logits above "
        f"{TOLERANCE['float32']:g} fails, in bfloat16 above {TOLERANCE['bfloat16']:g}",
    )
