"""Results of the stage ``algorithm``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class CarriedOver:
    """How often values put in from the counterpart's run turn the answer into the counterpart's."""

    size: int  #: features, neurons or dimensions
    share: Interval  #: of the test pairs, with a 95 % Wilson interval
    random: float | None  #: the same of as many matched random ones, or of a random subspace; None: there is none


@dataclasses.dataclass(frozen=True)
class PlantedScores:
    """What the method says of a circuit that was planted."""

    prompts: int  #: that were traced
    #: by set of transcoders (trained, untrained, random): of the influence through edges as a sign of which are planted
    auroc: Mapping[str, Interval]
    strongest: Mapping[str, Interval]  #: likewise: share of planted ones among as many strongest edges as are planted
    #: by behaviour (differ: the MLP of layer 0 carries it; third: it does not), then by what is put in at that MLP
    carried: Mapping[str, Mapping[str, CarriedOver]]


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
    planted: PlantedScores | None = None  #: of a planted circuit
