"""Results of the stage ``algorithm``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class AlgorithmResults:
    """A transformer that was trained on an algorithm."""

    steps: int  #: of training
    questions: int  #: that it was trained on
    seconds: float  #: of training, in the process that ended it
    fresh: int  #: questions of each sort that none of the training had
    accuracy: Mapping[str, Interval]  #: by sort of question: share of right answers, with a 95 % Wilson interval
    wanted: Mapping[str, float]  #: by sort of question: the share that is asked for
    labels: tuple[str, ...]  #: variables that `prompts.jsonl` tells of each prompt
