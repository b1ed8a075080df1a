"""The stage ``known_circuits``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig

CIRCUITS = ("induction", "logic")


@dataclasses.dataclass(frozen=True)
class KnownConfig(Config):
    """Transformers whose weights are set by hand, so that their circuits are known."""

    circuits: tuple[str, ...] = setting(
        (),
        "circuits: the word that followed this one before (induction), functions of two bits (logic); empty: none",
        choices=CIRCUITS,
        changes_results=False,
    )
    prompts: int = setting(
        40, "prompts of each behaviour that choose features, and as many that judge", low=10, high=100
    )
    graphs: int = setting(5, "prompts of each behaviour that are traced", low=2, high=100)
    seed: int = setting(0, "seed of weights, prompts and texts", low=0, high=2**31 - 1)


def _run(run: Run) -> Any:
    from saejax.ground_truth.circuits.run import run_known_circuits

    return run_known_circuits(run)


def _results() -> Any:
    from saejax.ground_truth.results import KnownCircuitResults

    return KnownCircuitResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.ground_truth.circuits.report import sections

    return sections(findings, draw)


KNOWN_CIRCUITS = Stage(
    name="known_circuits",
    summary="writes transformers that are set by hand, and says whether graphs and causal tests find their circuits",
    run=_run,
    results=_results,
    groups=(KnownConfig,),
    makes_model=True,
    placement=(MeshConfig,),
    names=lambda configs: configs[KnownConfig].circuits,
    section=_sections,
    revision=3,  # without the accuracy and the logits of transformers that are right by construction
)
