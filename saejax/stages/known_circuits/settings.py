"""Settings of transformers that are set by hand."""

import dataclasses

from saejax.config import Config, setting

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
    prompts: int = 40  #: prompts of each behaviour that choose features, and as many that judge; no flag
    graphs: int = 5  #: prompts of each behaviour that are traced; no flag
    seed: int = 0  #: of weights, prompts and texts; no flag
