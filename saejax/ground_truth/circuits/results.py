"""Results of the stage ``known_circuits``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class EdgeScores:
    """Attribution graphs compared with the known edges; intervals are 95 % t intervals over prompts."""

    prompts: int  #: whose graphs were made
    #: largest difference between an edge and the products of weights along its paths, over the largest edge
    error: float
    auroc: Interval  #: of the size of edges, as a sign of which pairs of nodes have one
    precision: Interval  #: share of the graph's circuit that is in the known one
    recall: Interval  #: share of the known circuit that is in the graph's
    replacement: Interval  #: share of influence that goes through no error


@dataclasses.dataclass(frozen=True)
class CausalScores:
    """The causal stages compared with the known variables; None: the stage refused, see ``refused``."""

    behaviours: int  #: that were tested
    #: share of prompts whose answer becomes the counterpart's when its top features do, with a 95 % Wilson interval
    interchange: Interval | None
    interchange_random: float | None  #: the same of random sets of as many features; None: there are too few features
    harm: float | None  #: accuracy lost without the top features, mean over behaviours
    harm_others: float | None  #: the largest loss of another behaviour; None with one behaviour
    claimed: int | None  #: behaviours whose two-way accuracy falls when the top features are ablated
    idle: int  #: variables that no answer depends on
    idle_claimed: int | None  #: of these, how many have such an effect
    probe: Interval | None  #: accuracy of probes of the features, pooled over labels, with a 95 % Wilson interval
    probe_shuffled: float | None  #: that of probes of shuffled labels, mean
    refused: tuple[str, ...]  #: what a stage said instead
    #: behaviours most of whose answers the top features carry over; None: not measured
    carried: int | None = None
    shown: int | None = None  #: behaviours that are both claimed and carried: the features stand for the variable


@dataclasses.dataclass(frozen=True)
class JudgedSet:
    """A set of transcoders of all layers."""

    recovered: float  #: share of the neurons that have a feature with a cosine above 0.9
    edges: EdgeScores  #: of its attribution graphs
    causal: CausalScores | None  #: of one layer's features; None where only edges are known


@dataclasses.dataclass(frozen=True)
class KnownCircuitResults:
    """Results of the method on a transformer whose weights were set by hand."""

    layers: int  #: of the transformer
    neurons: int  #: of all layers
    accuracy: float  #: of the transformer on its prompts
    logit_error: float  #: largest difference of its logits from those of its description in float64, over the largest
    circuit: float  #: edges of a known circuit, mean over prompts
    sets: Mapping[str, JudgedSet]  #: exact, wrong, random, untrained, trained
