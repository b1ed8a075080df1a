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
    digits: int = setting(3, "digits of each number to add", low=1, high=8, only=("addition",))
    nodes: int = setting(6, "nodes of each graph", low=3, high=10, only=("paths",))
    edges: int = setting(8, "largest number of edges of a graph", low=2, high=45, only=("paths",))
    steps: int = setting(4000, "maximum number of training steps; it ends once fresh questions are answered", low=1)
    batch: int = setting(256, "questions in a step", low=1)
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW", low=0.0)
    layers: int = setting(2, "layers of the transformer", low=1)
    width: int = setting(96, "width of its residual stream, in 4 heads", low=8)
    prompts: int = setting(
        100, "prompts of each behaviour that select features, and as many that test them", low=10, high=1000
    )
    seed: int = setting(0, "seed of weights, questions and prompts", low=0, high=2**31 - 1)


def _run(run: Run) -> Any:
    from saejax.ground_truth.algorithms.run import run_algorithm

    return run_algorithm(run)


def _results() -> Any:
    from saejax.ground_truth.algorithms.results import AlgorithmResults

    return AlgorithmResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.ground_truth.algorithms.report import sections

    return sections(findings, draw)


ALGORITHM = Stage(
    name="algorithm",
    summary="trains a small transformer on an algorithm with known variables, and writes prompts that state them",
    run=_run,
    results=_results,
    groups=(AlgorithmConfig,),
    makes_model=True,
    placement=(MeshConfig,),
    names=lambda configs: configs[AlgorithmConfig].names,
    section=_sections,
)
