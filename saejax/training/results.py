"""Results of the stage ``train``."""

import dataclasses

from saejax.dictionaries.results import TrainedMember
from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class TrainResults:
    """A stack that was trained."""

    kind: str  #: of the dictionaries
    steps: int  #: of training
    tokens: int  #: of training, repeats counted
    tokens_per_second: float  #: without compilation
    seconds: float  #: of all steps
    members: tuple[TrainedMember, ...]  #: of the stack
    mesh: MeshShape  #: that it was trained on
    best_checkpoint: int | None = None  #: step of the best one by `train.best`
