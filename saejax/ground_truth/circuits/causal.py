"""The causal stages on a transformer set by hand, with the features of one of its layers.

The stages run unchanged, each in its own folder with its usual files.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from saejax.dictionaries import load_dictionary
from saejax.errors import UserError
from saejax.files import write_text
from saejax.ground_truth.circuits.cases import Case
from saejax.ground_truth.circuits.results import CausalScores
from saejax.interventions.ablate_run import run_ablate
from saejax.interventions.answers import AblateResults, BehaviourVerdict
from saejax.interventions.patch_run import FeaturePatchResults, PatchResults, run_patch
from saejax.interventions.probe_run import ProbeResults, run_probe
from saejax.interventions.table import TESTED, EffectsTable, load_effects
from saejax.library.causal import ablate
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.runner.config import Config
from saejax.runner.workspace import Run
from saejax.settings import AblateConfig, ModelConfig, PatchConfig, ProbeConfig, TaskConfig
from saejax.tasks.baseline import run_baseline
from saejax.tasks.own_prompts import as_line
from saejax.tasks.results import BaselineResults
from saejax.tasks.scoring import wilson

T = TypeVar("T")
_BOOTSTRAP = 1000
LEVEL = 0.05  # of claims, after correction


class KnownStages:
    """The causal stages on one transformer.

    Args:
      run: the run of the stage ``known_circuits``; the transformer is in its folder.
      case: the case.
      model: the transformer.
    """

    def __init__(self, run: Run, case: Case, model: LanguageModel):
        self._run, self._case, self._model = run, case, model
        path = run.folder / "prompts.jsonl"
        write_text(path, "".join(map(as_line, case.prompts)))
        task = TaskConfig(behaviours=(), prompts=str(path))
        self._configs = run.configs | ModelConfig(path=str(run.folder / "model")) | task
        self.baseline: BaselineResults = self._stage("baseline", "", run_baseline, task)

    def judge(self, name: str, transcoder: Path, features: Mapping[str, list[int]]) -> CausalScores:
        """Return the results of the stages with a transcoder's features.

        Args:
          name: name of its set, for the stages' folders.
          transcoder: its folder.
          features: idle variable -> the features that represent it.
        """
        count = max(map(len, self._case.causes.values()))
        settings: dict[str, Any] = dict(dictionary=str(transcoder), top=count)
        # The vocabulary is small and mostly answers, so there are no placebo targets.
        quick: dict[str, Any] = dict(baselines=(), text_documents=0, placebo_targets=0, untrained=False)
        refused: list[str] = []

        def tried(stage: str, run_stage: Callable[[Run], T], config: Config) -> T | None:
            try:
                return self._stage(stage, name, run_stage, config)
            except UserError as error:
                refused.append(f"{stage}: {error}")
                return None

        ablated = tried("ablate", run_ablate, AblateConfig(**settings, bootstrap=_BOOTSTRAP, **quick))
        patched = tried("patch", run_patch, PatchConfig(**settings, bootstrap=_BOOTSTRAP, placebo_targets=0))
        labels: dict[str, Any] = dict(labels=self._case.labels, sparse=(), shuffles=2, strengths=(10.0,))
        probed = tried("probe", run_probe, ProbeConfig(dictionary=str(transcoder), **labels))
        options = dict(bootstrap=_BOOTSTRAP, **quick)
        claimed = self._idle(transcoder, features, options, refused)
        interchange, interchange_random = _interchange(patched) if patched else (None, None)
        table = load_effects(self._run.folder / "ablate" / name) if ablated else None
        harm, harm_others = _harm(ablated, table) if ablated and table else (None, None)
        probe, probe_shuffled = _probes(probed) if probed else (None, None)
        harmed, carried = _harmed(ablated) if ablated else None, _carried(patched) if patched else None
        return CausalScores(
            behaviours=len(self._case.causes),
            interchange=interchange,
            interchange_random=interchange_random,
            harm=harm,
            harm_others=harm_others,
            claimed=None if harmed is None else len(harmed),
            idle=len(features),
            idle_claimed=claimed,
            probe=probe,
            probe_shuffled=probe_shuffled,
            refused=tuple(refused),
            carried=None if carried is None else len(carried),
            shown=None if harmed is None or carried is None else len(harmed & carried),
        )

    def _stage(self, stage: str, name: str, run_stage: Callable[[Run], T], config: Config) -> T:
        """Run a stage in its own folder with these settings."""
        folder = self._run.folder / stage / name
        folder.mkdir(parents=True, exist_ok=True)
        inputs = dict(baseline=self._run.folder / "baseline")
        overrides: dict[str, Any] = dict(
            stage=stage, name=name, folder=folder, configs=self._configs | config, inputs=inputs
        )
        say = lambda line: self._run.say(f"{name}: {line}" if name else line)  # noqa: E731
        return run_stage(dataclasses.replace(self._run, say=say, **overrides))

    def _idle(
        self, transcoder: Path, features: Mapping[str, list[int]], options: Mapping[str, Any], refused: list[str]
    ) -> int | None:
        """Return the number of idle variables whose features have an effect on a behaviour when ablated."""
        dictionary, claimed = load_dictionary(transcoder), 0
        behaviour = next(iter(self._case.causes))
        prompts = [prompt for prompt in self._case.prompts if prompt.behaviour == behaviour]
        for variable, indices in features.items():
            try:
                results = ablate(self._model, dictionary, prompts, features=indices, **options)
            except UserError as error:
                refused.append(f"ablate of {variable}: {error}")
                return None
            claimed += _has_effect(results.verdict.dictionaries[TESTED][behaviour])
        return claimed


def _interchange(results: PatchResults) -> tuple[Interval | None, float | None]:
    """Return the interchange accuracy of the top features and of random ones, pooled over behaviours."""
    assert isinstance(results, FeaturePatchResults)
    shares = [behaviour.interchange for behaviour in results.behaviours.values() if behaviour.interchange]
    if not shares:
        return None, None
    # Counts again, so that behaviours are pooled by their prompts.
    flipped = sum(round(share.top.mean * share.prompts) for share in shares)
    random = [share.random for share in shares if share.random is not None]
    return _share(flipped, sum(share.prompts for share in shares)), float(np.mean(random)) if random else None


def _carried(results: PatchResults) -> set[str]:
    """Return the behaviours most of whose answers the top features carry over: the interval is above one half.

    A layer's few features leave too few random sets to compare with.
    """
    assert isinstance(results, FeaturePatchResults)
    shares = {name: behaviour.interchange for name, behaviour in results.behaviours.items() if behaviour.interchange}
    return {name for name, share in shares.items() if share.top.low > 0.5}


def _harm(ablated: AblateResults, table: EffectsTable) -> tuple[float, float | None]:
    """Return the two-way accuracy lost, and the largest loss of another behaviour."""
    results = ablated.verdict.dictionaries[TESTED].values()
    effects = [result.ablation["two_way"].effect for result in results]
    lost = [effect.mean for effect in effects if effect]
    others = []
    for name in table.behaviours:
        for other in set(table.behaviours) - {name}:
            # The last of the edits of the top features is their whole ablation.
            prompts, whole = table.select_prompts(other), table.select_edits(name, "top")[-1:]
            # Another behaviour should lose nothing: its answers do not depend on these neurons.
            clean_P, ablated_1xP = table.clean_values(prompts, "logit_diff"), table.values(whole, prompts, "logit_diff")
            others.append(float((clean_P > 0).mean() - (ablated_1xP > 0).mean()))
    return float(np.mean(lost)), max(others, default=None)


def _harmed(ablated: AblateResults) -> set[str]:
    """Return the behaviours on whose two-way accuracy ablating the top features has an effect."""
    return {name for name, result in ablated.verdict.dictionaries[TESTED].items() if _has_effect(result)}


def _has_effect(result: BehaviourVerdict) -> bool:
    """Return whether two-way accuracy falls. A layer's few features leave too few random sets to compare with."""
    return result.ablation["two_way"].answer == "yes"


def _probes(results: ProbeResults) -> tuple[Interval, float]:
    """Return the accuracy of probes of all features, pooled over labels and behaviours, and with shuffled labels."""
    fits = [
        (probe, sum(counts["test"] for counts in label.classes.values()))
        for label in results.labels
        for probe in label.probes
        if probe.input == "features" and probe.k is None
    ]
    right = sum(round(probe.accuracy.mean * count) for probe, count in fits)
    shuffled = float(np.mean([probe.shuffled.mean for probe, _ in fits]))
    return _share(right, sum(count for _, count in fits)), shuffled


def _share(count: int, of: int) -> Interval:
    # As many successes as were counted, which is all that the interval depends on.
    return wilson(np.arange(of) < count)
