"""Settings of circuits of behaviours."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, setting


@dataclasses.dataclass(frozen=True)
class CircuitsConfig(Config):
    """Circuits of behaviours, with the transcoders of --graph.transcoders."""

    behaviours: tuple[str, ...] = setting((), "behaviours whose circuits are found; empty: none")
    traced: int = setting(10, "number of train prompts of each behaviour that are traced, to select features", low=1)
    groups: str = setting(
        "",
        'file of groups to measure in place of proposed ones, .json: {"two_hop": [["places", "3_17_content", '
        '"12_208_last"]]}, features as layer_index_role with a role of content, context or last',
        changes_results=False,  # what is in it counts
    )
    seed: int = shared.causal_seed()
    measured: int = 20  #: maximum number of test prompts of each behaviour on which effects are measured; no flag
