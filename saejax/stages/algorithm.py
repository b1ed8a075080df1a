"""The stage ``algorithm``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig

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


def _run(run: Run) -> Any:
    from saejax.ground_truth.algorithms.run import run_algorithm

    return run_algorithm(run)


def _results() -> Any:
    from saejax.ground_truth.results import AlgorithmResults

    return AlgorithmResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.ground_truth.report import algorithm_sections

    return algorithm_sections(findings, draw)


ALGORITHM = Stage(
    name="algorithm",
    summary="trains a small transformer on an algorithm, and says which of its features change its answers",
    run=_run,
    results=_results,
    groups=(AlgorithmConfig,),
    makes_model=True,
    placement=(MeshConfig,),
    names=lambda configs: configs[AlgorithmConfig].names,
    section=_sections,
    revision=3,  # with the effects of features
)
