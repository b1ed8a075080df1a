"""Results of the stage ``train``."""

import dataclasses

from saejax.dictionaries.results import TrainedMember
from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class TrainResults:
    """A stack that was trained.

    Attributes:
      kind: of the dictionaries.
      steps: of training.
      tokens: of training, repeats counted.
      tokens_per_second: without compilation.
      seconds: of all steps.
      members: of the stack.
      mesh: that it was trained on.
      best_checkpoint: step of the best one by `train.best`.
    """

    kind: str
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    members: tuple[TrainedMember, ...]
    mesh: MeshShape
    best_checkpoint: int | None = None
