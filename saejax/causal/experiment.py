"""What the tests of features measure a behaviour with."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from saejax.interventions.engine import LogitDiffs
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.interventions.replacement import ActivationSource
from saejax.interventions.split_model import SplitModel


class Experiment(Protocol):
    """A behaviour on a model and a dictionary of F features, with N positions of train and P test prompts."""

    name: str
    templates: list[str]  # of the test prompts, in their order

    @property
    def replacement(self) -> ActivationSource:
        """What stands in place of removed features."""

    def attribution(self) -> np.ndarray:
        """Each feature's attribution, mean over the train prompts, [F]."""

    def test_attribution(self, estimate: str) -> np.ndarray:
        """Each feature's attribution by one of ``settings.ESTIMATES``, mean over the test prompts, [F]."""

    def statistics(self) -> FeatureStatistics:
        """How often and how strongly features fire on the test prompts, and on those that lend replacements."""

    def max_activations(self) -> np.ndarray:
        """Each feature's largest activation on each test prompt, [P, F]."""

    def train_values(self) -> np.ndarray:
        """Values of the site on the train prompts, [N, D]."""

    def answer_means(self) -> np.ndarray:
        """Means of the site's last value over the train prompts of each of G correct answers, [G, D]."""

    def changes(self, features: Sequence[int]) -> np.ndarray:
        """Inner products of what removing each of K features changes at the site, mean over test prompts, [K, K]."""

    def ablate(self, sets: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> LogitDiffs:
        """The logit difference of each test prompt, or of those at these places, without each set of features."""

    def skip(self, rows: int) -> None:
        """Says that so many pairs of a set and a prompt, which were expected, are not run."""

    def ablate_train(self, sets: Sequence[Sequence[int]]) -> LogitDiffs:
        """The logit difference of each train prompt without each set of features."""

    def on(self, split: SplitModel, basis: str) -> "Experiment":
        """The same behaviour on the model cut for another basis, which has this name."""
