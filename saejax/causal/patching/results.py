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
class PatchedFeatures(PatchedPairs):
    """The features of a dictionary patched; also in `<behaviour>.json`."""

    features: tuple[PatchedFeature, ...]  #: each top feature
    together: tuple[PatchedSet, ...]  #: growing sets of them, and all features
    interchange: Interchange  #: how often the answer goes over


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
class FeaturePatchResults:
    """A dictionary's features."""

    dictionary: str  #: its name
    site: str  #: that it writes to, or reads
    top: int  #: features chosen
    draws: int  #: of matched random ones
    behaviours: Mapping[str, PatchedFeatures]  #: by name
    unpatched: Mapping[str, str]  #: behaviour -> why it was not patched


PatchResults = SitePatchResults | FeaturePatchResults
