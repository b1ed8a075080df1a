"""Results of the stage ``patch``: of a kind of site, and of a dictionary's features."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class PatchedPairs:
    """The pairs of prompts and counterparts of a behaviour, without a patch.

    Attributes:
      prompts: pairs.
      clean, corrupted: logit difference of the prompts, and of their counterparts.
      difference: clean - corrupted, by which effects are normalised.
      reason: why there are no normalised effects: the difference is not clearly above 0; None where there are.
      left_out: test prompts without a counterpart, or with one of another number of tokens.
    """

    prompts: int
    clean: Interval
    corrupted: Interval
    difference: Interval
    reason: str | None
    left_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class TokenColumn:
    """What stands at a position.

    Attributes:
      position: from the end, -1 is the last token.
      prompts: that have it.
      token: the most frequent one.
      share: of the prompts that have this one there.
      differs: share of the pairs whose tokens differ there.
    """

    position: int
    prompts: int
    token: str
    share: float
    differs: float


@dataclasses.dataclass(frozen=True)
class StrongestPatch:
    """The place of largest effect.

    Attributes:
      layer: from 0.
      position: from the end.
      effect: logits.
      normalised: a share; None where that is not defined.
    """

    layer: int
    position: int
    effect: float
    normalised: float | None


@dataclasses.dataclass(frozen=True)
class WorkShare:
    """How much was run.

    Attributes:
      run: what was.
      all: what there is.
    """

    run: int
    all: int


@dataclasses.dataclass(frozen=True)
class PatchedSites(PatchedPairs):
    """A kind of site patched at every layer and position; also in `<behaviour>.json`.

    Attributes:
      columns: the positions, first to last.
      strongest: by direction.
      rows: of the model.
      work: tokens times layers.
    """

    columns: tuple[TokenColumn, ...]
    strongest: Mapping[str, StrongestPatch]
    rows: WorkShare
    work: WorkShare


@dataclasses.dataclass(frozen=True)
class PatchEffect:
    """By how much the logit difference moves.

    Attributes:
      effect: logits.
      normalised: share of clean - corrupted, ratio of means; None where that is not clearly above 0.
    """

    effect: Interval
    normalised: Interval | None


@dataclasses.dataclass(frozen=True)
class PatchedFeature:
    """One feature patched.

    Attributes:
      feature: its number.
      denoising: its value of the prompt put into the counterpart.
      noising: the other way.
    """

    feature: int
    denoising: PatchEffect
    noising: PatchEffect


@dataclasses.dataclass(frozen=True)
class PatchedSet:
    """The first so many top features patched together.

    Attributes:
      features: how many.
      denoising, noising: as of one feature.
    """

    features: int | Literal["all"]
    denoising: PatchEffect
    noising: PatchEffect


@dataclasses.dataclass(frozen=True)
class InterchangeTop:
    """How often a set carries the answer over.

    Attributes:
      features: how many of the top ones.
      accuracy: share of the pairs.
      random: the same of as many matched random features, mean over the draws.
    """

    features: int
    accuracy: Interval
    random: Interval


@dataclasses.dataclass(frozen=True)
class Interchange:
    """How often the counterpart's values turn the answer into the counterpart's (IIA); None without such pairs.

    Attributes:
      prompts: pairs on which the model is right both times.
      top: growing sets of top features.
      all: all features.
      error: the error term alone.
      site: the whole site.
      said: in words.
    """

    prompts: int
    top: tuple[InterchangeTop, ...]
    all: Interval | None
    error: Interval | None
    site: Interval | None
    said: str


@dataclasses.dataclass(frozen=True)
class PatchedFeatures(PatchedPairs):
    """The features of a dictionary patched; also in `<behaviour>.json`.

    Attributes:
      features: each top feature.
      together: growing sets of them, and all features.
      interchange: how often the answer goes over.
    """

    features: tuple[PatchedFeature, ...]
    together: tuple[PatchedSet, ...]
    interchange: Interchange


@dataclasses.dataclass(frozen=True)
class UnpatchedBehaviour:
    """A behaviour that could not be patched.

    Attributes:
      unpatched: why.
    """

    unpatched: str


@dataclasses.dataclass(frozen=True)
class SitePatchResults:
    """A kind of site.

    Attributes:
      kind: of the site.
      behaviours: by name.
      unpatched: behaviour -> why it was not patched.
    """

    kind: str
    behaviours: Mapping[str, PatchedSites]
    unpatched: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class FeaturePatchResults:
    """A dictionary's features.

    Attributes:
      dictionary: its name.
      site: that it writes to, or reads.
      top: features chosen.
      draws: of matched random ones.
      behaviours: by name.
      unpatched: behaviour -> why it was not patched.
    """

    dictionary: str
    site: str
    top: int
    draws: int
    behaviours: Mapping[str, PatchedFeatures]
    unpatched: Mapping[str, str]


PatchResults = SitePatchResults | FeaturePatchResults
