"""Costs of the stage ``algorithm``."""

from saejax.costs.cost import START, Cost, PlannedRun
from saejax.stages.algorithm import AlgorithmConfig

_TOKENS = {"addition": 13, "paths": 12}  # of a question, with the default settings
_OVERHEAD = 4.0  # small products: measured on two cores, in units of their time


def algorithm_cost(plan: PlannedRun, name: str) -> Cost:
    """Return the cost of all steps; training ends earlier where fresh questions are answered."""
    config = plan.configs[AlgorithmConfig]
    weights = 13 * config.layers * config.width**2
    questions = config.steps * config.batch
    return Cost(
        flops=6.0 * weights * _TOKENS[name] * questions,
        overhead=_OVERHEAD,
        host_seconds=START,
        counts=dict(questions=questions),
    )
