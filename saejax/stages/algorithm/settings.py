"""Settings of transformers that are trained on an algorithm."""

import dataclasses

from saejax.config import Config, setting

ALGORITHMS = ("addition", "paths")


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig(Config):
    """Transformers trained here on an algorithm."""

    names: tuple[str, ...] = setting(
        (),
        "algorithms: sums of two numbers, digit by digit (addition); next node and distance on a graph (paths); empty: "
        "none",
        choices=ALGORITHMS,
        changes_results=False,
    )
    digits: int = setting(3, "digits of each number to add", low=2, high=8, only=("addition",))
    steps: int = setting(800, "training steps; the report says whether they were enough", low=1)
    seed: int = setting(0, "seed of weights, questions and prompts", low=0, high=2**31 - 1)
