"""Results of the stage ``circuits``."""

import dataclasses
from collections.abc import Mapping

from saejax.circuits.edges import Edge
from saejax.circuits.groups import Group, Key


@dataclasses.dataclass(frozen=True)
class CircuitResults:
    """The circuit of a behaviour."""

    traced: int  #: train prompts whose graphs chose the features
    measured: int  #: test prompts on which effects were measured
    swapped: int  #: of these, those whose counterpart has as many tokens
    logit_diff: float  #: mean logit difference of the measured prompts
    answer: str  #: correct answer of the first measured prompt
    groups: tuple[Group, ...]  #: the most influential first
    edges: tuple[Edge, ...]  #: every measured effect with its controls
    returning: tuple[Key, ...]  #: the features that return, the most influential first
    layers: int  #: number of layers of the model
    swapped_logit_diff: float | None = None  #: mean logit difference of the swapped prompts; None if there are none

    def drawn(self, edit: str = "direct") -> list[Edge]:
        """Return the drawn edges of one of ``measure.EDITS``; the edges of "direct" are the arrows of the picture."""
        return [edge for edge in self.edges if edge.drawn and edge.edit == edit]


@dataclasses.dataclass(frozen=True)
class CircuitsResults:
    """Circuits of behaviours."""

    behaviours: Mapping[str, CircuitResults]  #: by behaviour
    left_out: Mapping[str, str]  #: behaviours that the model does not have, and why
    #: behaviours with circuits of which the model is unsure, and why
    weak: Mapping[str, str] = dataclasses.field(default_factory=dict)
