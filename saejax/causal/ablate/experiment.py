"""One behaviour on a language model: what the tests of features measure with."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.causal.parts import OnProgress, silent
from saejax.errors import UserError
from saejax.interventions import activity
from saejax.interventions import engine as ablation
from saejax.interventions import slopes as screening
from saejax.interventions.engine import AblatedRun, LogitDiffs
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.interventions.replacement import ActivationSource
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.settings import AblateConfig
from saejax.tasks.behaviours import Prompt
from saejax.workspace import fingerprint


class PartProgress:
    """The progress of a behaviour, whose sets are removed in several calls: in rows, each a set and a prompt.

    Args:
      on_progress: called with the rows done and to do of the behaviour; may raise to stop.
      rows: of the behaviour, as expected.
    """

    def __init__(self, on_progress: OnProgress = silent, rows: int = 0):
        self._on_progress, self._rows, self._done = on_progress, rows, 0

    def check(self) -> None:
        """Says where the behaviour is, which may raise to stop."""
        self._on_progress(self._done, max(self._done, self._rows))

    def skip(self, rows: int) -> None:
        """So many of the rows that were expected are not run."""
        self._rows -= rows

    def of_call(self, rows: int) -> OnProgress:
        """What the next call, of so many rows, takes: it is told the share of its work that is done."""
        before, self._done = self._done, self._done + rows
        most = max(self._done, self._rows)
        return lambda done, total: self._on_progress(before + (done * rows // total if total else 0), most)


class ModelExperiment:
    """A ``verdict.Experiment``: one behaviour on a language model cut at a dictionary's site.

    Args:
      name: of the behaviour.
      prompts: of this behaviour, of both splits.
      progress: of the behaviour; may raise to stop.
      folder: where measurements are kept, so that an experiment that was killed does not repeat them. None: nowhere.
      attribution_F: of every feature on the train prompts, if it is known; None: it is computed when it is asked for.

    Raises:
      UserError: there are no train or no test prompts.
    """

    def __init__(
        self,
        split: SplitModel,
        name: str,
        prompts: Sequence[Prompt],
        config: AblateConfig,
        progress: PartProgress | None = None,
        folder: Path | None = None,
        attribution_F: np.ndarray | None = None,
    ):
        self.name, self._split, self._config, self._folder = name, split, config, folder
        self._prompts, self._progress = prompts, progress or PartProgress()
        self._train = [prompt for prompt in prompts if prompt.split == "train"]
        self.test = [prompt for prompt in prompts if prompt.split == "test"]
        self.templates = [prompt.template for prompt in self.test]
        if not self._train or not self.test:
            raise UserError(
                f"behaviour {name} has {len(self._train)} train and {len(self.test)} test prompts: expected some of "
                "each; give both in --task.prompts, or run the stage baseline again"
            )
        self._attribution_F = attribution_F
        self._some: dict[tuple[int, ...], tuple[list[CleanRun], list[CleanRun]]] = {}
        self._progress.check()

    # Prompts are run when they are first asked for: who wants the attribution runs no test prompt.

    @functools.cached_property
    def _runs(self) -> list[CleanRun]:
        return self._split.run(self.test)

    @functools.cached_property
    def _train_runs(self) -> list[CleanRun]:
        return self._split.run(self._train)

    @functools.cached_property
    def _counterparts(self) -> list[CleanRun]:
        return self._lenders(self.test)

    @functools.cached_property
    def _train_counterparts(self) -> list[CleanRun]:
        return self._lenders(self._train)

    def _lenders(self, prompts: Sequence[Prompt]) -> list[CleanRun]:
        return self._split.run_counterparts(prompts) if self._config.replacement == "counterpart" else []

    @functools.cached_property
    def replacement(self) -> ActivationSource:
        """What stands in place of removed features."""
        kind = self._config.replacement
        return ActivationSource(
            kind,
            mean_F=activity.means(self._split, self._train_runs) if kind == "mean" else None,
            seed=np.uint32(self._config.seed) if kind == "random" else None,
        )

    def on(self, split: SplitModel, basis: str) -> "ModelExperiment":
        """The same behaviour on the model cut for another basis."""
        folder = self._folder and self._folder / fingerprint(basis)
        return ModelExperiment(split, self.name, self._prompts, self._config, self._progress, folder)

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
        if self._attribution_F is None:
            self._attribution_F = self._mean_attribution(
                self._train_runs, self._config.estimate, self._train_counterparts
            )
        return self._attribution_F

    def test_attribution(self, estimate: str) -> np.ndarray:
        return self._mean_attribution(self._runs, estimate, self._counterparts)

    def _mean_attribution(
        self, runs: Sequence[CleanRun], estimate: str, counterparts: Sequence[CleanRun]
    ) -> np.ndarray:
        attribution_NxF = screening.attribution(self._split, runs, estimate, self.replacement, counterparts)
        self._progress.check()
        return attribution_NxF.mean(axis=0, dtype=np.float64)

    def statistics(self) -> FeatureStatistics:
        return self._statistics

    @functools.cached_property
    def _statistics(self) -> FeatureStatistics:
        """On the test prompts, and on those that lend what stands in a feature's place: there it may have an effect."""
        lenders = self._train_runs if self._config.replacement == "mean" else self._counterparts
        return activity.statistics(self._split, [*self._runs, *lenders])

    def max_activations(self) -> np.ndarray:
        return activity.maxima(self._split, self._runs)

    def changes(self, features: Sequence[int]) -> np.ndarray:
        others = self._counterparts or self._runs
        parts = [
            ablation.changes(self._split, AblatedRun(run, other, self.replacement), features)
            for run, other in zip(self._runs, others, strict=True)
        ]
        return np.sum(parts, axis=0) / len(self.test)

    def ablate(self, sets: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> LogitDiffs:
        if prompts is None or len(prompts) == len(self.test):
            return self._ablate("test", self._runs, self._counterparts, sets)
        key = tuple(map(int, prompts))
        if key not in self._some:
            chosen = [self.test[place] for place in key]
            self._some[key] = self._split.run(chosen), self._lenders(chosen)
        return self._ablate("some", *self._some[key], sets)

    def skip(self, rows: int) -> None:
        self._progress.skip(rows)

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
            self._progress.of_call(len(sets) * sum(len(run.index_P) for run in runs)),
            source=self.replacement,
            counterparts=counterparts,
            readouts=self._config.readouts,
            folder=self._folder / half if self._folder else None,
        )
