"""Results of the stages ``ground_truth``, ``known_circuits`` and ``algorithm``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class FoundFeatures:
    """Scores of a dictionary against the world; each with its 95 % t interval over seeds.

    Shares are of the directions that are active in more than a ten-thousandth of the held-out vectors.
    """

    recovered: Interval  #: share with a matched feature of absolute cosine above 0.9, one to one
    mcc: Interval  #: mean absolute cosine of features and directions, matched one to one (Hungarian method)
    f1: Interval  #: of a direction being active and its matched feature firing, mean over directions
    f1_features: Interval  #: the same of every feature and its nearest direction, mean over features (SynthSAEBench)
    uniqueness: Interval  #: number of distinct nearest directions, divided by the number of features
    split: Interval  #: share along which at least two features have most of their squared length
    merged: Interval  #: share whose nearest feature is also the nearest of another direction, and close to both
    absorbed: Interval  #: share whose parent latent is absorbed by a child latent
    l0: Interval  #: features that fire on a vector, mean
    dead: Interval  #: share of the features that never fire
    explained_variance: Interval  #: of the vectors
    best_f1: Interval  #: `f1` of the world's largest activations, as many as `l0`
    best_explained_variance: Interval  #: `explained_variance` of these, decoded by the true directions
    invented: Interval  #: share of the live features with no absolute cosine above 0.71 to any direction


@dataclasses.dataclass(frozen=True)
class JudgedDictionary:
    """Dictionaries that differ only in their seed, scored together."""

    name: str  #: of the members without their seeds; "" if nothing else is swept
    control: str  #: "frozen" (a random decoder that stays), or ""
    seeds: tuple[int, ...]  #: of training
    scores: FoundFeatures  #: over these seeds


@dataclasses.dataclass(frozen=True)
class WorldFacts:
    """The synthetic world, measured on the held-out vectors."""

    features: int  #: number of directions
    frequent: int  #: of these, active in more than a ten-thousandth of the vectors
    dimensions: int  #: width of a vector
    l0: float  #: active directions of a vector, mean


@dataclasses.dataclass(frozen=True)
class TruthResults:
    """Dictionaries of one kind, or controls, compared with the synthetic world that they were trained on."""

    kind: str  #: kind of the dictionaries
    features: int  #: features of each dictionary
    samples: int  #: vectors that each was trained on, repeats counted
    held_out: int  #: vectors that each was judged on
    world: WorldFacts  #: facts about the world
    dictionaries: tuple[JudgedDictionary, ...]  #: in the order of the stack


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
    """Causal tests compared with the known variables."""

    behaviours: int  #: that were tested
    #: share of prompts whose answer becomes the counterpart's when its top features do, with a 95 % Wilson interval
    interchange: Interval
    interchange_random: float | None  #: the same of random lists of the top features' dose; None: none reaches it
    accuracy_drop: float  #: of two-way accuracy without the top features, mean over behaviours
    accuracy_drop_random: float | None  #: the same without random lists of their dose; None: none reaches it
    claimed: int  #: behaviours whose two-way accuracy falls when the top features are ablated
    #: behaviours in which the top features carry over most answers, and more answers than 95 % of the random lists of
    #: their dose; where no list reaches the dose, most answers are enough
    carried: int
    shown: int  #: behaviours that are both claimed and carried: the features stand for the variable
    idle: int  #: variables that no answer depends on
    idle_claimed: int  #: of these, how many have an effect on two-way accuracy


@dataclasses.dataclass(frozen=True)
class JudgedSet:
    """A set of transcoders of all layers."""

    recovered: float  #: share of the neurons that have a feature with a cosine above 0.9
    edges: EdgeScores  #: of its attribution graphs
    causal: CausalScores  #: of one layer's features


@dataclasses.dataclass(frozen=True)
class KnownCircuitResults:
    """Results of the method on a transformer whose weights were set by hand."""

    layers: int  #: of the transformer
    neurons: int  #: of all layers
    sets: Mapping[str, JudgedSet]  #: exact, wrong, random, trained


@dataclasses.dataclass(frozen=True)
class AblatedFeatures:
    """The features of a dictionary, each ablated alone."""

    live: int  #: features that fire on a test prompt
    #: share of the live features whose ablation makes an answer right or wrong, with a 95 % Wilson interval
    changing: Interval
    #: share of the live features with a larger effect than 95 % of the random directions, with a 95 % Wilson interval
    above: Interval
    effect: Interval  #: absolute change of the logit difference on prompts on which a feature fires, mean over features


@dataclasses.dataclass(frozen=True)
class VariableFeature:
    """A value of one of the algorithm's variables, and the feature that goes with it most on train prompts."""

    variable: str  #: its name, such as "carry"
    value: str  #: such as "yes"
    prompts: int  #: test prompts that have it; the others of the variable do not
    feature: int  #: whose activation, where the answer is predicted, is most correlated with having the value
    auc: float  #: of this activation on test prompts, 0 to 1; by chance 0.5
    p_holm: float  #: of an AUC as large with labels permuted, after Holm's correction over all values
    drop: float  #: of the logit difference without the feature, mean over test prompts with the value
    random_drop: float  #: the same without its activation along a random direction


@dataclasses.dataclass(frozen=True)
class AlgorithmResults:
    """A transformer that was trained on an algorithm."""

    #: by kind of question: share of correct answers to questions kept from training, with a 95 % Wilson interval
    accuracy: Mapping[str, Interval]
    required: Mapping[str, float]  #: by kind of question: the share that training aims at
    prompts: int  #: test prompts, on which features are ablated
    features: Mapping[str, AblatedFeatures]  #: of the residual stream between its layers: trained, random directions
    variables: tuple[VariableFeature, ...]  #: the algorithm's variables, as labels of the prompts know them
