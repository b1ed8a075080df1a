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
    steps: int = 800  #: of training; the report says whether they were enough; no flag
    seed: int = 0  #: of weights, questions and prompts; no flag
    digits: int = 3  #: of each number to add; no flag
