"""Results of the stage ``patch``: of a kind of site, and of a dictionary's features."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class PatchedPairs:
    """The pairs of prompts and counterparts of a behaviour, without a patch."""

    prompts: int  #: pairs
    templates: int  #: that they were made from, which intervals resample first; 0: pairs are resampled one by one
    clean: Interval  #: logit difference of the prompts, and of their counterparts
    corrupted: Interval  #: logit difference of the prompts, and of their counterparts
    difference: Interval  #: clean - corrupted, by which effects are normalised
    #: why there are no normalised effects: the difference is not clearly above 0; None where there are
    reason: str | None
    left_out: Mapping[str, int]  #: test prompts without a counterpart, or with one of another number of tokens


@dataclasses.dataclass(frozen=True)
class TokenColumn:
    """What stands at a position."""

    position: int  #: from the end, -1 is the last token
    prompts: int  #: that have it
    token: str  #: the most frequent one
    share: float  #: of the prompts that have this one there
    differs: float  #: share of the pairs whose tokens differ there


@dataclasses.dataclass(frozen=True)
class StrongestPatch:
    """The place of largest effect on train prompts, as many as there are test prompts, judged on test prompts."""

    layer: int  #: from 0
    position: int  #: from the end
    train_effect: float  #: by which it was chosen, logits; larger than on other prompts, as the largest of many
    effect: Interval  #: on test prompts, logits
    normalised: Interval | None  #: a share; None where that is not defined


@dataclasses.dataclass(frozen=True)
class WorkShare:
    """How much was run."""

    run: int  #: what was
    all: int  #: what there is


@dataclasses.dataclass(frozen=True)
class PatchedSites(PatchedPairs):
    """A kind of site patched at every layer and position; also in `<behaviour>.json`."""

    columns: tuple[TokenColumn, ...]  #: the positions, first to last
    strongest: Mapping[str, StrongestPatch]  #: by direction; none without train prompts that choose it
    rows: WorkShare  #: of the model, for test and train prompts
    work: WorkShare  #: tokens times layers, likewise


@dataclasses.dataclass(frozen=True)
class EstimatedNodes:
    """An estimate of nodes, made on train prompts, beside exact effects on test prompts."""

    #: rank correlation (Spearman) of its size with that of the effect over random nodes, and its 95 % bootstrap
    #: interval over nodes; None where one of the two is the same for all
    correlation: Interval | None
    top: float  #: mean size of the effects of the nodes that it puts first, logits
    #: Mann-Whitney test, one-sided, of those beside the random nodes, not adjusted; None where there are no others
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class NodeEffect:
    """A node: a vector of an attention head at one position, put in from the counterpart's run."""

    node: str  #: query, key, value or output
    layer: int  #: from 0
    head: int  #: from 0; keys and values have as many heads as the model has of them
    position: int  #: from the end, -1 is the last token
    effect: Interval  #: by how much the logit difference falls, on test prompts, logits
    atp: float  #: that as AtP estimates it, on train prompts
    atp_star: float  #: the size of that as AtP* estimates it, likewise


@dataclasses.dataclass(frozen=True)
class SenderEffect:
    """A head or MLP whose direct path to a receiver is patched."""

    layer: int  #: from 0
    head: int | None  #: None: the MLP
    effect: Interval  #: by how much the logit difference falls, logits
    p_max_t: float  #: sign flips over pairs, adjusted for all senders of the receiver by step-down maxT


@dataclasses.dataclass(frozen=True)
class PathReceiver:
    """What tells a query, key or value, or the logits, along the stream."""

    node: str  #: query, key, value or logits
    layer: int  #: from 0; of the logits the number of layers
    head: int  #: from 0
    position: int  #: from the end, of the senders, too
    total: Interval  #: effect of patching it whole; of the logits, of replacing the prompt
    senders: int  #: heads and MLPs of earlier layers
    sure: int  #: of these with p_max_t at most 0.05
    strongest: tuple[SenderEffect, ...]  #: the first 10 by the size of the effect


@dataclasses.dataclass(frozen=True)
class PatchedHeads(PatchedPairs):
    """Nodes of attention heads patched one by one; also in `<behaviour>.json`."""

    columns: tuple[TokenColumn, ...]  #: the positions, first to last
    nodes: int  #: whose vector changes in a train pair
    measured: int  #: of these patched exactly
    random: (
        Interval | None
    )  #: mean size of the effects of random nodes, 95 % bootstrap over nodes; None: nothing changes
    estimates: Mapping[str, EstimatedNodes]  #: atp_star, atp, and change: the length of the vector's change alone
    strongest: tuple[NodeEffect, ...]  #: those that AtP* puts first, in its order
    paths: tuple[PathReceiver, ...]  #: to the logits and to the first queries, keys and values; none unless asked for


@dataclasses.dataclass(frozen=True)
class PatchEffect:
    """By how much the logit difference moves."""

    effect: Interval  #: logits
    normalised: Interval | None  #: share of clean - corrupted, ratio of means; None where that is not clearly above 0


@dataclasses.dataclass(frozen=True)
class PatchedFeature:
    """One feature patched."""

    feature: int  #: its number
    denoising: PatchEffect  #: its value of the prompt put into the counterpart
    noising: PatchEffect  #: the other way


@dataclasses.dataclass(frozen=True)
class PatchedSet:
    """The first so many top features patched together."""

    features: int | Literal["all"]  #: how many
    denoising: PatchEffect  #: as of one feature
    noising: PatchEffect  #: as of one feature


@dataclasses.dataclass(frozen=True)
class InterchangeTop:
    """How often a set carries the answer over."""

    features: int  #: how many of the top ones
    accuracy: Interval  #: share of the pairs, with its 95 % Wilson interval
    random: Interval  #: the same of as many features drawn from those matched to them and themselves, mean over draws
    #: randomisation test: (1 + draws that carry at least as many answers over) / (1 + draws), not adjusted
    p_value: float


@dataclasses.dataclass(frozen=True)
class Interchange:
    """How often the counterpart's values turn the answer into the counterpart's (IIA); None without such pairs.

    Shares have 95 % Wilson intervals.
    """

    prompts: int  #: pairs on which the model is right both times
    top: tuple[InterchangeTop, ...]  #: growing sets of top features
    all: Interval | None  #: all features
    error: Interval | None  #: the error term alone
    #: the whole site, features and error at every position: no part of it can carry over more than by chance, so this
    #: is the ceiling that the others are read against, and no finding of its own
    ceiling: Interval | None
    said: str  #: in words


@dataclasses.dataclass(frozen=True)
class Disentangled:
    """What putting the counterparts' values in does to this behaviour and to the others; 95 % Wilson intervals."""

    method: str  #: features, random features (mean of the draws), DAS, random subspace, or whole site
    size: int  #: features, or dimensions
    cause: Interval | None  #: share of the pairs whose answer becomes the counterpart's; None without pairs
    isolate: Mapping[str, Interval]  #: share of each other behaviour's pairs whose answer stays


@dataclasses.dataclass(frozen=True)
class PatchedFeatures(PatchedPairs):
    """The features of a dictionary patched; also in `<behaviour>.json`."""

    features: tuple[PatchedFeature, ...]  #: each top feature
    together: tuple[PatchedSet, ...]  #: growing sets of them, and all features
    interchange: Interchange  #: how often the answer goes over
    disentangled: tuple[Disentangled, ...]  #: cause and isolate beside DAS; none unless asked for


@dataclasses.dataclass(frozen=True)
class UnpatchedBehaviour:
    """A behaviour that could not be patched."""

    unpatched: str  #: why


@dataclasses.dataclass(frozen=True)
class SitePatchResults:
    """A kind of site."""

    kind: str  #: of the site
    behaviours: Mapping[str, PatchedSites]  #: by name
    unpatched: Mapping[str, str]  #: behaviour -> why it was not patched


@dataclasses.dataclass(frozen=True)
class HeadPatchResults:
    """Attention heads."""

    top: int  #: nodes of each estimate that were patched exactly
    drawn: int  #: random nodes at most
    behaviours: Mapping[str, PatchedHeads]  #: by name
    unpatched: Mapping[str, str]  #: behaviour -> why it was not patched


@dataclasses.dataclass(frozen=True)
class FeaturePatchResults:
    """A dictionary's features."""

    dictionary: str  #: its name
    site: str  #: that it writes to, or reads
    top: int  #: features chosen
    draws: int  #: of matched random ones
    behaviours: Mapping[str, PatchedFeatures]  #: by name
    unpatched: Mapping[str, str]  #: behaviour -> why it was not patched


PatchResults = SitePatchResults | HeadPatchResults | FeaturePatchResults
