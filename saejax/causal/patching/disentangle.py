"""Whether what carries one behaviour's answers over leaves those of the others alone (RAVEL; Huang et al., 2024, arXiv
2402.17700).

*Cause* is the share of a behaviour's pairs whose answer becomes the counterpart's when the counterpart's values of the
features, or of a subspace, are put in; *isolate* the share of the other behaviours' pairs whose answer stays as it was
when the same is done with their counterparts. Of both, pairs count on which the model is right both times. Features
stand between two lines: a subspace that was learned for its cause (``subspace``), and the whole site, whose cause is a
ceiling and which isolates nothing. Below stand matched random features and a random subspace.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import NamedTuple

import numpy as np

from saejax.causal.clustered import of_prompts
from saejax.causal.patching.features import COUNTERPART, patch_parts
from saejax.causal.patching.results import Disentangled
from saejax.causal.patching.subspace import learn_subspace, patch_subspace, random_subspace
from saejax.interventions.engine import ablate_sets
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.results import Interval
from saejax.runner.parts import OnProgress, silent
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt


class Sides(NamedTuple):
    """Runs of prompts and of their counterparts, row by row."""

    base: Sequence[CleanRun]
    source: Sequence[CleanRun]

    @classmethod
    def of(cls, split: SplitModel, pairs: Sequence[Prompt]) -> "Sides":
        """Of prompts with counterparts of as many tokens."""
        return cls(split.run(pairs), split.run_counterparts(pairs))


class PairsJudge:
    """Which answers of a behaviour's pairs go over, whatever is put in.

    Args:
      pairs: test prompts with counterparts of as many tokens.
    """

    def __init__(self, split: SplitModel, pairs: Sequence[Prompt], config: PatchConfig):
        self._split, self._sides, self._rows = split, Sides.of(split, pairs), config.batch_rows
        clean_P, corrupted_P = (ablate_sets(split, run, [], self._rows).clean_P for run in self._sides)
        self._both_P = (clean_P > 0) & (corrupted_P < 0)
        self._resampling = of_prompts(pairs, config.bootstrap, config.seed)

    @property
    def width(self) -> int:
        """Of the site."""
        return self._sides.base[0].value_BxTxD.shape[-1]

    @property
    def pairs(self) -> int:
        """On how many the model is right both times."""
        return int(self._both_P.sum())

    def sets(self, sets: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Of each pair the share of sets of features that carry its answer over [P]."""
        base, source = self._sides
        found = ablate_sets(self._split, base, list(sets), self._rows, source=COUNTERPART, counterparts=source)
        return (found.ablated_SxP[:, self._both_P] < 0).mean(axis=0)

    def subspace(self, directions_DxK: np.ndarray) -> np.ndarray:
        """Whether a subspace carries each pair's answer over [P]."""
        return patch_subspace(self._split, *self._sides, directions_DxK)[self._both_P] < 0

    def site(self) -> np.ndarray:
        """Whether the whole site does [P]."""
        return patch_parts(self._split, *self._sides, "site")[self._both_P] < 0

    def share(self, carried_P: np.ndarray) -> Interval:
        """The share of pairs, or its mean over draws, with its 95 % Wilson interval by template."""
        return self._resampling.among(self._both_P).share(carried_P)


def compare(
    split: SplitModel,
    name: str,
    train: Sequence[Prompt],
    judges: Mapping[str, PairsJudge],
    features: tuple[Sequence[int], Sequence[Sequence[int]] | np.ndarray],
    config: PatchConfig,
    on_progress: OnProgress = silent,
) -> tuple[Disentangled, ...]:
    """Learns a subspace for a behaviour, and judges it beside features.

    Args:
      name: of the behaviour; with the seed it decides the subspaces.
      train: its train prompts with counterparts of as many tokens.
      judges: of all behaviours.
      features: the top ones, and draws of matched ones.
      on_progress: called with the tokens done and to do of what is learned; may raise to stop.
    """
    seed, sides = [config.seed, *name.encode()], Sides.of(split, train)
    learned_DxK = learn_subspace(split, *sides, config.das, config.das_steps, seed, on_progress)
    subspaces = {"DAS": learned_DxK, "random subspace": random_subspace(len(learned_DxK), config.das, seed)}
    others = {other: judge for other, judge in judges.items() if other != name}
    return disentangle(judges[name], others, *features, subspaces)


def disentangle(
    own: PairsJudge,
    others: Mapping[str, PairsJudge],
    top: Sequence[int],
    drawn: Sequence[Sequence[int]] | np.ndarray,
    subspaces: Mapping[str, np.ndarray],
) -> tuple[Disentangled, ...]:
    """Cause and isolate of top features, matched random ones, subspaces and the whole site, in this order.

    Args:
      own: of the behaviour that features and subspaces are of.
      others: of the other behaviours by name; those without pairs are left out.
      top: features.
      drawn: draws of as many matched features, of which the mean is shown.
      subspaces: their directions [D, K] by name.
    """
    others = {name: judge for name, judge in others.items() if judge.pairs}

    def row(method: str, size: int, carried: Callable[[PairsJudge], np.ndarray]) -> Disentangled:
        cause = own.share(carried(own)) if own.pairs else None
        return Disentangled(method, size, cause, {name: one.share(1.0 - carried(one)) for name, one in others.items()})

    rows = [
        row("features", len(top), lambda judge: judge.sets([top])),
        row("random features", len(top), lambda judge: judge.sets(drawn)),
    ]
    for name, directions_DxK in subspaces.items():
        rows.append(row(name, directions_DxK.shape[1], methodcaller("subspace", directions_DxK)))
    return (*rows, row("whole site", own.width, methodcaller("site")))
