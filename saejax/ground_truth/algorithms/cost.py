"""What the stage ``algorithm`` takes."""

from saejax.costs.cost import START, Cost, PlannedRun
from saejax.stages.algorithm import AlgorithmConfig

# Of a question, with the usual settings; a planted one goes through five times.
_TOKENS = {"addition": 13, "paths": 12, "planted": 45}
_OVERHEAD = 4.0  # its products are small: measured on two cores, in units of their time


def algorithm_cost(plan: PlannedRun, name: str) -> Cost:
    """All steps; training ends before them where questions are answered."""
    config = plan.configs[AlgorithmConfig]
    weights = 13 * config.layers * config.width**2
    questions = config.steps * config.batch
    return Cost(
        flops=6.0 * weights * _TOKENS[name] * questions,
        overhead=_OVERHEAD,
        host_seconds=START,
        counts=dict(questions=questions),
    )
