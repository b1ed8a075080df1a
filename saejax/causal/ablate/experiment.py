"""One behaviour on a language model: what the tests of features measure with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.causal import ablation, activity, screening
from saejax.causal.ablation import AblatedRun, LogitDiffs
from saejax.causal.activation_sources import ActivationSource
from saejax.causal.controls import FeatureStatistics
from saejax.causal.parts import OnProgress, silent
from saejax.causal.split import CleanRun, SplitModel
from saejax.errors import UserError
from saejax.settings import AblateConfig
from saejax.tasks.behaviours import Prompt
from saejax.workspace import fingerprint


class ModelExperiment:
    """A ``verdict.Experiment``: one behaviour on a language model cut at a dictionary's site.

    Args:
      split: the model.
      name: of the behaviour.
      prompts: of this behaviour, of both splits.
      config: of the stage.
      on_progress: called with the tokens done and to do; may raise to stop.
      folder: where measurements are kept, so that an experiment that was killed does not repeat them. None: nowhere.

    Raises:
      UserError: there are no train or no test prompts.
    """

    def __init__(
        self,
        split: SplitModel,
        name: str,
        prompts: Sequence[Prompt],
        config: AblateConfig,
        on_progress: OnProgress = silent,
        folder: Path | None = None,
    ):
        self.name, self._split, self._config, self._on_progress, self._folder = name, split, config, on_progress, folder
        self._prompts = prompts
        self._train = [prompt for prompt in prompts if prompt.split == "train"]
        self.test = [prompt for prompt in prompts if prompt.split == "test"]
        self.templates = [prompt.template for prompt in self.test]
        if not self._train or not self.test:
            raise UserError(
                f"behaviour {name} has {len(self._train)} train and {len(self.test)} test prompts: expected some of "
                "each; give both in --task.prompts, or run the stage baseline again"
            )
        on_progress(0, 0)
        self._runs, self._train_runs = split.run(self.test), split.run(self._train)
        counterpart = config.replacement == "counterpart"
        self._counterparts = split.run_counterparts(self.test) if counterpart else []
        self._train_counterparts = split.run_counterparts(self._train) if counterpart else []
        self._some: dict[tuple[int, ...], tuple[list[CleanRun], list[CleanRun]]] = {}
        self._replacement = ActivationSource(
            config.replacement,
            mean_F=activity.means(split, self._train_runs) if config.replacement == "mean" else None,
            seed=np.uint32(config.seed) if config.replacement == "random" else None,
        )

    @property
    def replacement(self) -> ActivationSource:
        """What stands in place of removed features."""
        return self._replacement

    def on(self, split: SplitModel, basis: str) -> "ModelExperiment":
        """The same behaviour on the model cut for another basis."""
        folder = self._folder and self._folder / fingerprint(basis)
        return ModelExperiment(split, self.name, self._prompts, self._config, self._on_progress, folder)

    def train_values(self) -> np.ndarray:
        """Values of the site on the train prompts, where features may change, [N, D]."""
        kept = [(run.value_BxTxD, run.domain_BxT, len(run.index_P)) for run in self._train_runs]
        return np.concatenate(
            [np.asarray(value[:count], np.float32)[np.asarray(domain[:count])] for value, domain, count in kept]
        )

    def answer_means(self) -> np.ndarray:
        last: dict[int, list[np.ndarray]] = {}
        for run in self._train_runs:
            for row in range(len(run.index_P)):
                value_D = np.asarray(run.value_BxTxD[row, run.last_B[row]], np.float64)
                last.setdefault(int(run.answers_Bx2[row, 0]), []).append(value_D)
        return np.stack([np.mean(values, axis=0) for _, values in sorted(last.items())])

    def attribution(self) -> np.ndarray:
        return self._attribution(self._train_runs, self._config.estimate, self._train_counterparts)

    def test_attribution(self, estimate: str) -> np.ndarray:
        return self._attribution(self._runs, estimate, self._counterparts)

    def _attribution(self, runs: Sequence[CleanRun], estimate: str, counterparts: Sequence[CleanRun]) -> np.ndarray:
        attribution_NxF = screening.attribution(self._split, runs, estimate, self._replacement, counterparts)
        self._on_progress(0, 0)
        return attribution_NxF.mean(axis=0, dtype=np.float64)

    def statistics(self) -> FeatureStatistics:
        """On the test prompts, and on those that lend what stands in a feature's place: there it may have an effect."""
        lenders = self._train_runs if self._config.replacement == "mean" else self._counterparts
        return activity.statistics(self._split, [*self._runs, *lenders])

    def max_activations(self) -> np.ndarray:
        return activity.maxima(self._split, self._runs)

    def changes(self, features: Sequence[int]) -> np.ndarray:
        others = self._counterparts or self._runs
        parts = [
            ablation.changes(self._split, AblatedRun(run, other, self._replacement), features)
            for run, other in zip(self._runs, others, strict=True)
        ]
        return np.sum(parts, axis=0) / len(self.test)

    def ablate(self, sets: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> LogitDiffs:
        if prompts is None or len(prompts) == len(self.test):
            return self._ablate("test", self._runs, self._counterparts, sets)
        key = tuple(map(int, prompts))
        if key not in self._some:
            chosen = [self.test[place] for place in key]
            others = self._split.run_counterparts(chosen) if self._counterparts else []
            self._some[key] = self._split.run(chosen), others
        return self._ablate("some", *self._some[key], sets)

    def ablate_train(self, sets: Sequence[Sequence[int]]) -> LogitDiffs:
        return self._ablate("train", self._train_runs, self._train_counterparts, sets)

    def _ablate(
        self, half: str, runs: Sequence[CleanRun], counterparts: Sequence[CleanRun], sets: Sequence[Sequence[int]]
    ) -> LogitDiffs:
        return ablation.ablate_sets(
            self._split,
            runs,
            sets,
            self._config.batch_rows,
            self._on_progress,
            source=self._replacement,
            counterparts=counterparts,
            readouts=self._config.readouts,
            folder=self._folder / half if self._folder else None,
        )
