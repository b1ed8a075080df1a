"""Results of the stage ``algorithm``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class AlgorithmResults:
    """A transformer that was trained on an algorithm."""

    steps: int  #: of training
    questions: int  #: of training
    seconds: float  #: of training, in the process that finished it
    fresh: int  #: questions of each kind that were kept from training
    accuracy: Mapping[str, Interval]  #: by kind of question: share of correct answers, with a 95 % Wilson interval
    required: Mapping[str, float]  #: by kind of question: the share that training aims at
    labels: tuple[str, ...]  #: variables of the algorithm that `prompts.jsonl` states for each prompt
