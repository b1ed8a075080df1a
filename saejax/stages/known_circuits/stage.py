"""The stage ``known_circuits``."""

from saejax.ground_truth.results import KnownCircuitResults
from saejax.runner.stage import Stage
from saejax.stages.known_circuits.report import sections
from saejax.stages.known_circuits.run import run_known_circuits
from saejax.stages.known_circuits.settings import KnownConfig

KNOWN_CIRCUITS = Stage(
    name="known_circuits",
    summary="writes transformers that are set by hand, and says whether graphs and causal tests find their circuits",
    run=run_known_circuits,
    results=KnownCircuitResults,
    groups=(KnownConfig,),
    makes_model=True,
    names=lambda configs: configs[KnownConfig].circuits,
    section=sections,
    revision=4,  # the accuracy that random lists of the top features' dose cost
)
