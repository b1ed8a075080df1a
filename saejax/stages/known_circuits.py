"""The stage ``known_circuits``."""

import dataclasses

from saejax.runner.config import Config, setting
from saejax.runner.stage import Stage
from saejax.settings import MeshConfig

CIRCUITS = ("chain", "induction", "logic")


@dataclasses.dataclass(frozen=True)
class KnownConfig(Config):
    """Transformers whose weights are set by hand, so that their circuits are known."""

    circuits: tuple[str, ...] = setting(
        (),
        "circuits: features passed on from layer to layer (chain), the word that followed this one before (induction), "
        "functions of two bits (logic); empty: none",
        choices=CIRCUITS,
        changes_results=False,
    )
    prompts: int = setting(
        40, "prompts of each behaviour that choose features, and as many that judge", low=10, high=100
    )
    graphs: int = setting(5, "prompts of each behaviour that are traced", low=2, high=100)
    draws: int = setting(100, "draws of matched random features in the stage patch", low=60)
    seed: int = setting(0, "seed of weights, prompts and texts", low=0, high=2**31 - 1)


KNOWN_CIRCUITS = Stage(
    name="known_circuits",
    summary="writes transformers that are set by hand, and says whether graphs and causal tests find their circuits",
    run="saejax.ground_truth.circuits.run:run_known_circuits",
    results="saejax.ground_truth.circuits.results:KnownCircuitResults",
    groups=(KnownConfig,),
    makes_model=True,
    placement=(MeshConfig,),
    names=lambda configs: configs[KnownConfig].circuits,
    cost="saejax.ground_truth.circuits.cost:known_cost",
    section="saejax.ground_truth.circuits.report:sections",
)
