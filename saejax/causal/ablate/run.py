"""The stage ``ablate``: which features cause each behaviour, judged by a rule written down before there are data.

Train prompts choose the top features by attribution (``screening``); test prompts judge them: they are removed one by
one and together (``ablation``), beside sets of as many random features matched on the same prompts and positions
(``controls``), and a rule says yes or no (``verdict``). Sets that grow show how many
features it takes (``nested``). On request the top features are tested as a circuit (``circuits``), and every feature
that fires is removed by itself (``importance``).
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from saejax.causal import positions, stability
from saejax.causal.ablate import agreement, baselines, nested, verdict
from saejax.causal.ablate.experiment import ModelExperiment
from saejax.causal.ablate.importance import PERMUTATIONS, importance_file, measure_importance
from saejax.causal.ablate.results import AblateResults, BehaviourAblation
from saejax.causal.circuits.measure import test_circuit
from saejax.causal.claims import SetEffects
from saejax.causal.parts import (
    Measure,
    Measured,
    OnProgress,
    each_part,
    load_run_dictionary,
    load_run_model,
    load_trained,
    part_file,
    partial_folder,
    read_behaviours,
)
from saejax.causal.split import SplitModel
from saejax.causal.statistics import least_p
from saejax.dictionaries import Dictionary
from saejax.models.language_model import LanguageModel
from saejax.parallel import is_first_process, wait_for_all
from saejax.settings import AblateConfig
from saejax.workspace import Run, write_text


def run_ablate(run: Run) -> AblateResults:
    """Tests a dictionary's features on every behaviour.

    A behaviour is a part in the sense of ``stages``. Its logit differences, from which every figure can be derived
    again, are in ``<behaviour>-prompts.jsonl``, the drawn controls in ``<behaviour>-controls.jsonl`` and, if they were
    asked for, the effects of all features in ``<behaviour>-importance.parquet``.
    """
    config: AblateConfig = run.configs["ablate"]
    positions.parse(config.positions)
    baselines.check(config)
    agreement.check(config)
    prompts, dictionary = read_behaviours(run), load_run_dictionary(run)
    others = {name: load_trained(run, name, "--ablate.compare") for name in config.compare}

    def begin() -> Measure:
        model = load_run_model(run)
        split = SplitModel(model, dictionary, config.positions, config.error)

        def measure(name: str, on_progress: OnProgress) -> Measured:
            experiment = ModelExperiment(split, name, prompts[name], config, on_progress, partial_folder(run, name))
            results = _test_and_save(run, experiment, config, model, dictionary, others)
            return Measured(results, results.reason)

        return measure

    parts = each_part(run, list(prompts), begin, BehaviourAblation)
    wait_for_all("ablate: scores written")  # by the first process
    behaviours = verdict.settled(parts, {name: _saved_effects(run, name) for name in parts}, config)
    return AblateResults(
        dictionary=config.dictionary,
        site=dictionary.site,
        rule=verdict.rule(config),
        replacement=config.replacement,
        top=config.top,
        draws=config.draws,
        behaviours=behaviours,
    )


def _test_and_save(
    run: Run,
    experiment: ModelExperiment,
    config: AblateConfig,
    model: LanguageModel,
    dictionary: Dictionary,
    others: Mapping[str, Dictionary],
) -> BehaviourAblation:
    results, measured = verdict.judge(experiment.name, experiment, config)
    results, scores = _with_sets(results, experiment, measured, config)
    if config.baselines:
        results = dataclasses.replace(results, baselines=baselines.compare(experiment, model, dictionary, config))
    if config.effects == "all":
        importance, drop_NxP = measure_importance(experiment, config)
        halves = stability.between_halves(drop_NxP, config.seed)
        summary = importance.summary(config.top, halves, least_p(len(experiment.test), PERMUTATIONS))
        if others:
            pairs = agreement.measure_agreement(experiment, importance, model, dictionary, others, config)
            summary = dataclasses.replace(summary, agreement=pairs)
        results = dataclasses.replace(results, importance=summary)
        if is_first_process():
            importance.save(importance_file(run.folder, experiment.name))
    if is_first_process():
        _save_scores(run, experiment, measured, scores)
    return results


def _saved_effects(run: Run, name: str) -> SetEffects:
    """What the rule asks about, from the scores that a behaviour's part wrote."""
    lines = [json.loads(line) for line in part_file(run, name, "-prompts.jsonl").read_text("utf-8").splitlines()]
    clean_P, joint_P, controls_PxN = (np.array([line[of] for line in lines]) for of in ("clean", "joint", "controls"))
    return verdict.effects_of(clean_P, joint_P, controls_PxN.T)


def _save_scores(
    run: Run,
    experiment: ModelExperiment,
    measured: verdict.JudgedDiffs,
    scores: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Writes the logit difference of every test prompt under every removal, and the drawn controls."""
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
        write_text(part_file(run, experiment.name, ending), text)


def _with_sets(
    results: BehaviourAblation, experiment: ModelExperiment, measured: verdict.JudgedDiffs, config: AblateConfig
) -> tuple[BehaviourAblation, dict[str, dict[str, np.ndarray]]]:
    """The results with those of sets, as far as they were asked for, and the scores behind them, prompts last."""
    scores: dict[str, dict[str, np.ndarray]] = {}
    if config.curve:
        curve = nested.cumulative_curve(experiment, measured)
        results = dataclasses.replace(results, curve=curve.summary(config))
        scores["curve"] = dict(top=curve.top_SxP, controls=curve.controls_CxNxP)
    if config.greedy:
        grown = nested.grow(experiment, measured.attribution_F, config.greedy)
        results = dataclasses.replace(results, greedy=grown.summary(config))
        scores["greedy"] = dict(greedy=grown.greedy_NxP, top=grown.top_NxP)
    if config.circuit_tests:
        circuit, of_circuit = test_circuit(experiment, measured.top, config)
        results = dataclasses.replace(results, circuit=circuit)
        scores["circuit"] = of_circuit.by_kind if of_circuit else {}
    return results, scores
