"""The stage ``algorithm``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig

ALGORITHMS = ("addition", "paths", "planted")


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig(Config):
    """Transformers that are trained here on an algorithm."""

    names: tuple[str, ...] = setting(
        (),
        "which: sums of two numbers, digit by digit (addition), the next node and the distance on a graph (paths), a "
        "function of three bits by a circuit that is planted (planted); empty: none",
        choices=ALGORITHMS,
        changes_results=False,
    )
    digits: int = setting(3, "of each number to be added", low=1, high=8, only=("addition",))
    nodes: int = setting(6, "of each graph", low=3, high=10, only=("paths",))
    edges: int = setting(8, "of each graph, at most", low=2, high=45, only=("paths",))
    steps: int = setting(4000, "steps of training at most; it ends where fresh questions are answered", low=1)
    batch: int = setting(256, "questions of a step", low=1)
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW", low=0.0)
    layers: int = setting(2, "of the transformer", low=1)
    width: int = setting(96, "of its stream, in 4 heads", low=8)
    prompts: int = setting(
        100, "prompts of each behaviour that choose features, and as many that judge", low=10, high=1000
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
    summary="trains a small transformer on an algorithm whose variables are known, and writes prompts that tell them",
    run=_run,
    results=_results,
    groups=(AlgorithmConfig,),
    makes_model=True,
    placement=(MeshConfig,),
    names=lambda configs: configs[AlgorithmConfig].names,
    section=_sections,
)
