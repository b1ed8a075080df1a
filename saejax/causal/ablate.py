"""The stage ``ablate``: which features cause each behaviour, judged by a rule written before the data are seen.

Train prompts choose the top features by attribution (``screening``); test prompts judge them: they are removed one by
one and together (``ablation``), beside sets of as many random features matched in firing rate and activation size on
the same prompts and positions (``controls``), and a rule says yes or no (``verdict``). Sets that grow show how many
features it takes (``nested``). On request the top features are tested as a circuit (``circuit_tests``), and every
feature that fires is removed by itself (``importance``).
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.causal import ablation, activity, baselines, circuit_tests, nested, positions, screening, verdict
from saejax.causal.ablation import LogitDiffs
from saejax.causal.controls import FeatureStatistics
from saejax.causal.importance import PERMUTATIONS, importance_file, measure_importance
from saejax.causal.replacements import Replacement
from saejax.causal.split import CleanRun, SplitModel
from saejax.causal.statistics import least_p
from saejax.dictionaries import Dictionary, stacks
from saejax.errors import Interrupted, UserError
from saejax.models.language_model import LanguageModel, load_model
from saejax.parallel import AgreedStop, from_first_process, is_first_process, make_mesh
from saejax.settings import AblateConfig
from saejax.tasks.behaviours import Prompt, read_prompts
from saejax.workspace import Run, fingerprint, read_json, write_json, write_text

_SAY_EVERY = 5.0  # seconds


def run_ablate(run: Run) -> dict:
    """Tests a dictionary's features on every behaviour.

    Each behaviour's results are kept in ``<behaviour>.json`` as soon as they are there, and until then what has been
    measured for it in ``<behaviour>-partial/``, so that a run that was killed goes on where it was. A behaviour's logit
    differences, from which every figure can be derived again, are in ``<behaviour>-prompts.jsonl``, the drawn controls
    in ``<behaviour>-controls.jsonl`` and, if they were asked for, the effects of all features in
    ``<behaviour>-importance.parquet``.

    Returns:
      The results; WORKSPACE.md describes them.
    """
    config: AblateConfig = run.configs["ablate"]
    positions.parse(config.positions)
    baselines.check(config)
    by_behaviour: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(run.inputs["baseline"] / "prompts.jsonl"):
        by_behaviour.setdefault(prompt.behaviour, []).append(prompt)
    kind, _ = stacks.kind_and_member(config.dictionary)
    dictionary = stacks.load_member(run.inputs[f"train/{kind}"], config.dictionary, "--ablate.dictionary")
    # The first process says what is there: it may write the next one before another has looked.
    done = from_first_process(np.array([_file(run, name).exists() for name in by_behaviour], np.int32))
    behaviours = {name: read_json(_file(run, name)) for name, there in zip(by_behaviour, done, strict=True) if there}
    for name in behaviours:
        _drop_partial(run, name)
    if behaviours:
        run.say(f"ablate: kept from an earlier run: {', '.join(behaviours)}")
    if len(behaviours) < len(by_behaviour):
        model_config = run.configs["model"]
        mesh = make_mesh(run.configs.get("mesh"))
        model = load_model(model_config.path, model_config.revision, model_config.dtype, mesh, model_config.remat)
        split = SplitModel(model, dictionary, config.positions, config.error)
        stop = AgreedStop(run.stopping)
        for number, (name, prompts) in enumerate(by_behaviour.items(), 1):
            if name not in behaviours:
                label = f"ablate: {name} ({number} of {len(by_behaviour)})"
                tick = progress(run, label, stop)
                experiment = ModelExperiment(split, name, prompts, config, tick, _partial(run, name))
                behaviours[name] = _test_and_save(run, experiment, config, model, dictionary)
                run.say(f"{label}: {behaviours[name]['reason']}")
    return dict(
        dictionary=config.dictionary,
        site=dictionary.site,
        rule=verdict.rule(config),
        replacement=config.replacement,
        top=config.top,
        draws=config.draws,
        behaviours={name: behaviours[name] for name in by_behaviour},
    )


class ModelExperiment:
    """A ``verdict.Experiment``: one behaviour on a language model cut at a dictionary's site.

    Args:
      split: the model.
      name: of the behaviour.
      prompts: of this behaviour, of both splits.
      config: of the stage.
      tick: called with the tokens done and to do; may raise to stop.
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
        tick: Callable[[int, int], None] = lambda done, total: None,
        folder: Path | None = None,
    ):
        self.name, self._split, self._config, self._tick, self._folder = name, split, config, tick, folder
        self._prompts = prompts
        self._train = [prompt for prompt in prompts if prompt.split == "train"]
        self.test = [prompt for prompt in prompts if prompt.split == "test"]
        if not self._train or not self.test:
            raise UserError(
                f"behaviour {name} has {len(self._train)} train and {len(self.test)} test prompts: expected some of "
                "each; run the stage baseline again"
            )
        tick(0, 0)
        self._runs, self._train_runs = split.run(self.test), split.run(self._train)
        counterpart = config.replacement == "counterpart"
        self._counterparts = split.run_counterparts(self.test) if counterpart else []
        self._train_counterparts = split.run_counterparts(self._train) if counterpart and config.greedy else []
        self._replacement = Replacement(
            config.replacement,
            mean_F=activity.means(split, self._train_runs) if config.replacement == "mean" else None,
            seed=np.uint32(config.seed) if config.replacement == "random" else None,
        )

    def on(self, split: SplitModel, basis: str) -> "ModelExperiment":
        """The same behaviour on the model cut for another basis."""
        folder = self._folder and self._folder / fingerprint(basis)
        return ModelExperiment(split, self.name, self._prompts, self._config, self._tick, folder)

    def train_values(self) -> np.ndarray:
        """Values of the site on the train prompts, where features may change, [N, D]."""
        kept = [(run.value_BxTxD, run.domain_BxT, len(run.index_P)) for run in self._train_runs]
        return np.concatenate(
            [np.asarray(value[:count], np.float32)[np.asarray(domain[:count])] for value, domain, count in kept]
        )

    def attribution(self) -> np.ndarray:
        return self._attribution(self._train_runs, self._config.estimate)

    def test_attribution(self, estimate: str) -> np.ndarray:
        return self._attribution(self._runs, estimate)

    def _attribution(self, runs: Sequence[CleanRun], estimate: str) -> np.ndarray:
        attribution_NxF = screening.attribution(self._split, runs, estimate)
        self._tick(0, 0)
        return attribution_NxF.mean(axis=0, dtype=np.float64)

    def statistics(self) -> FeatureStatistics:
        return activity.statistics(self._split, self._runs)

    def max_activations(self) -> np.ndarray:
        return activity.maxima(self._split, self._runs)

    def ablate(self, sets: Sequence[Sequence[int]]) -> LogitDiffs:
        return self._ablate("test", self._runs, self._counterparts, sets)

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
            self._tick,
            replacement=self._replacement,
            counterparts=counterparts,
            readouts=self._config.readouts,
            folder=self._folder / half if self._folder else None,
        )


def _file(run: Run, behaviour: str, ending: str = ".json") -> Path:
    return run.folder / f"{behaviour}{ending}"


def _partial(run: Run, behaviour: str) -> Path:
    return _file(run, behaviour, "-partial")


def _drop_partial(run: Run, behaviour: str) -> None:
    """Removes what was kept to go on from; the first process does."""
    if is_first_process() and _partial(run, behaviour).exists():
        shutil.rmtree(_partial(run, behaviour))


def _test_and_save(
    run: Run, experiment: ModelExperiment, config: AblateConfig, model: LanguageModel, dictionary: Dictionary
) -> dict[str, Any]:
    results, measured = verdict.judge(experiment.name, experiment, config)
    of_sets, scores = _test_sets(experiment, measured, config)
    results |= of_sets
    if config.baselines:
        results["baselines"] = baselines.compare(experiment, model, dictionary, config)
    importance = None
    if config.effects == "all":
        importance, stability = measure_importance(experiment, config)
        least = least_p(len(experiment.test), PERMUTATIONS)
        results["importance"] = importance.summary(config.top) | dict(stability=stability, least_p=least)
    if not is_first_process():
        return results
    if importance:
        importance.save(importance_file(run.folder, experiment.name))
    by_prompt = [
        dict(
            text=prompt.text,
            correct=prompt.correct,
            wrong=prompt.wrong,
            clean=float(measured.clean_P[p]),
            joint=float(measured.joint_P[p]),
            top=measured.top_KxP[:, p].tolist(),
            controls=measured.controls_NxP[:, p].tolist(),
            **{test: {of: score[..., p].tolist() for of, score in kinds.items()} for test, kinds in scores.items()},
        )
        for p, prompt in enumerate(experiment.test)
    ]
    drawn = [dict(draw=n, features=features_C.tolist()) for n, features_C in enumerate(measured.controls_NxC)]
    for ending, lines in (("-prompts.jsonl", by_prompt), ("-controls.jsonl", drawn)):
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        write_text(_file(run, experiment.name, ending), text)
    write_json(_file(run, experiment.name), results)  # last: it says that the behaviour is done
    _drop_partial(run, experiment.name)
    return results


def _test_sets(
    experiment: ModelExperiment, measured: verdict.Measured, config: AblateConfig
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The entries of sets in the results, as far as they were asked for, and the scores behind them, prompts last."""
    results: dict[str, Any] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    if config.curve:
        curve = nested.cumulative_curve(experiment, measured)
        results["curve"] = curve.summary(config)
        scores["curve"] = dict(top=curve.top_SxP, controls=curve.controls_CxNxP)
    if config.greedy:
        grown = nested.grow(experiment, measured.attribution_F, config.greedy)
        results["greedy"] = grown.summary(config)
        scores["greedy"] = dict(greedy=grown.greedy_NxP, top=grown.top_NxP)
    if config.circuit_tests:
        results["circuit"], of_circuit = circuit_tests.test_circuit(experiment, measured.top, config)
        scores["circuit"] = of_circuit.by_kind if of_circuit else {}
    return results, scores


def progress(run: Run, label: str, stop: AgreedStop) -> Callable[[int, int], None]:
    """A function that says, now and then, how far it is, and raises ``Interrupted`` when the run is to stop."""
    start = said = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal start, said
        if stop():
            raise Interrupted(f"{label}: stopped; what was measured is kept: run the same command to go on")
        now = time.monotonic()
        if not done:
            start = now
        elif now - said > _SAY_EVERY and done < total:
            speed = done / max(now - start, 1e-9)
            run.say(f"{label}: {done:,} of {total:,} tokens, {speed:,.0f}/s, {(total - done) / speed:.0f} s to go")
            said = now

    return tick
