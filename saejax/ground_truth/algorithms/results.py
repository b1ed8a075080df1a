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
class EdgeCurve:
    """Circuits of more and more edges, in one order; of random ones means, and the middle 95 %, of the draws."""

    faithfulness: tuple[float, ...]  #: at each size; 0: as without edges, 1: as with all
    cpr: Interval  #: area under it over the share of edges; the interval resamples prompts
    cmd: Interval  #: area between it and 1, likewise


@dataclasses.dataclass(frozen=True)
class EdgeCurves:
    """What edges between words, MLPs at a position and the logit carry, the others as in the counterpart's run."""

    edges: int  #: that there can be
    prompts: int  #: on which circuits were run, none of which was traced
    sizes: tuple[int, ...]  #: edges of the circuits, to all
    curves: Mapping[str, EdgeCurve]  #: by what set the order: graphs of a set of transcoders, the truth, or chance
    #: by set of transcoders the faithfulness of all edges where MLPs give what features predict, and the counterpart's
    #: errors, with intervals over prompts
    alone: Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class PlantedScores:
    """What the method says of a circuit that was planted."""

    prompts: int  #: that were traced
    #: by set of transcoders (trained, untrained, random): of the influence through edges as a sign of which are planted
    auroc: Mapping[str, Interval]
    strongest: Mapping[str, Interval]  #: likewise: share of planted ones among as many strongest edges as are planted
    #: by behaviour (differ: the MLP of layer 0 carries it; third: it does not), then by what is put in at that MLP
    carried: Mapping[str, Mapping[str, CarriedOver]]
    circuits: EdgeCurves | None = None  #: of growing numbers of edges, by mean influence over the traced prompts


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
