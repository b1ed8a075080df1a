"""What the stage ``known_circuits`` takes."""

from saejax.costs.cost import Cost, PlannedRun
from saejax.stages.known_circuits import KnownConfig

# On two cores with the usual settings, most of it to compile programs: graphs, and of the last two causal tests.
_SECONDS = {"chain": 32.0, "induction": 50.0, "logic": 115.0}


def known_cost(plan: PlannedRun, name: str) -> Cost:
    """Transcoders, graphs and causal tests of a transformer that is set by hand."""
    return Cost(host_seconds=_SECONDS[name], counts=dict(prompts=plan.configs[KnownConfig].prompts))
