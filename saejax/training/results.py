"""Results of the stage ``train``."""

import dataclasses
from collections.abc import Sequence

from saejax.dictionaries.results import TrainedMember
from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class TrainResults:
    """A stack that was trained."""

    kind: str  #: of the dictionaries
    steps: int  #: of training, of each expansion
    tokens: int  #: of training, repeats counted, of each expansion
    tokens_per_second: float  #: without compilation
    seconds: float  #: of all steps
    members: tuple[TrainedMember, ...]  #: of the stack
    mesh: MeshShape  #: that it was trained on
    best_checkpoint: int | None = None  #: step of the best one by `train.best`; None of several expansions

    @classmethod
    def of_all(cls, each: Sequence["TrainResults"]) -> "TrainResults":
        """Of the stacks of each expansion, trained one after the other on the same tokens."""
        if len(each) == 1:
            return each[0]
        per_token = sum(1 / one.tokens_per_second for one in each if one.tokens_per_second)
        return dataclasses.replace(
            each[0],
            tokens_per_second=1 / per_token if per_token else 0.0,
            seconds=sum(one.seconds for one in each),
            members=tuple(member for one in each for member in one.members),
            best_checkpoint=None,
        )
