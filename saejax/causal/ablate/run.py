"""The stage ``ablate``: which features cause each behaviour, judged by rules written down before there are data.

Train prompts choose the top features by attribution (``screening``); test prompts judge them: they are removed one by
one and together (``ablation``), beside sets of as many random features matched on the same prompts and positions
(``controls``), beside other bases of the site at equal dose (``dose``), and from the prompts of the other behaviours
and from held-out text (``text``); rules say which of four answers hold (``grades``). Sets that grow show how many
features it takes (``nested``). On request the top features are tested as a circuit (``circuits``), and every feature
that fires is removed by itself (``importance``).
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from saejax.causal import parts, stability
from saejax.causal.ablate import agreement, cost, dose, grades, nested, repeats, verdict
from saejax.causal.ablate.experiment import ModelExperiment, PartProgress
from saejax.causal.ablate.importance import PERMUTATIONS, measure_importance, save_drops
from saejax.causal.ablate.results import AblateResults, BehaviourAblation
from saejax.causal.ablate.text import HeldOutText
from saejax.causal.circuits.measure import test_circuit
from saejax.causal.circuits.sizes import measure_sizes
from saejax.causal.claims import SetEffects
from saejax.causal.statistics import least_p
from saejax.dictionaries import Dictionary, stacks
from saejax.files import read_lines, write_lines
from saejax.interventions import positions
from saejax.interventions import slopes as screening
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import is_first_process, wait_for_all
from saejax.settings import AblateConfig, CorpusConfig, TaskConfig
from saejax.workspace import Run


def run_ablate(run: Run) -> AblateResults:
    """Tests a dictionary's features on every behaviour.

    A behaviour is a part in the sense of ``parts``. Its logit differences, from which every figure can be derived
    again, are in ``<behaviour>-prompts.jsonl``, the drawn controls in ``<behaviour>-controls.jsonl`` and, if they were
    asked for, the effects of all features in ``<behaviour>-importance.parquet`` and ``<behaviour>-drops.npy``.
    """
    config = run.configs[AblateConfig]
    positions.parse(config.positions)
    dose.check(config)
    agreement.check(config)
    prompts, dictionary = parts.read_behaviours(run), parts.load_run_dictionary(run)
    others = {name: stacks.load_trained(name, run.inputs, "--ablate.compare") for name in config.compare}
    trainings = {name: stacks.load_trained(name, run.inputs, "--ablate.repeats") for name in config.repeats}

    def begin() -> parts.Measure:
        model = parts.load_run_model(run)
        split = SplitModel(model, dictionary, config.positions, config.error)
        text = HeldOutText.of(run.configs[CorpusConfig], run.configs[TaskConfig], model, config.text_documents)
        # The top features of each behaviour are removed from the prompts of the others, too.
        several = prompts if len(prompts) > 1 else {}
        known = {name: ModelExperiment(split, name, several[name], config).attribution() for name in several}
        tops = {name: screening.leaders(attribution_F, config.top) for name, attribution_F in known.items()}

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            train, test = (sum(prompt.split == half for prompt in prompts[name]) for half in ("train", "test"))
            rows = cost.expected_rows(config, train, test, len(prompts), dictionary.config.n_features)
            progress = PartProgress(on_progress, round(rows))
            asked = split, name, prompts[name], config, progress, parts.partial_folder(run, name)
            experiment = ModelExperiment(*asked, attribution_F=known.get(name))
            foreign = {other: top for other, top in tops.items() if other != name}
            results = _test_and_save(
                run, experiment, config, Beside(model, split, dictionary, text, others, trainings, foreign)
            )
            return parts.Measured(results, results.grades.harms.reason)

        return measure

    measured = parts.each_part(run, list(prompts), begin, BehaviourAblation, unit="rows")
    wait_for_all("ablate: scores written")  # by the first process
    saved = {name: _saved_effects(run, name, result) for name, result in measured.items()}
    behaviours = grades.settled(measured, saved, config)
    for name, again in repeats.hold_again(behaviours).items():
        behaviours[name] = dataclasses.replace(behaviours[name], holds_again=again)
    for name, result in behaviours.items():
        run.say(f"{name}: {_answers(result)}")
    return AblateResults(
        dictionary=config.dictionary,
        site=dictionary.site,
        rule=grades.rule(config),
        replacement=config.replacement,
        top=config.top,
        draws=config.draws,
        behaviours=behaviours,
    )


class Beside(NamedTuple):
    """What a behaviour is tested with beside its own prompts."""

    model: LanguageModel
    split: SplitModel
    dictionary: Dictionary
    text: HeldOutText | None
    others: Mapping[str, Dictionary]  # dictionaries that it is compared with, by name
    trainings: Mapping[str, Dictionary]  # dictionaries that are tested in the same way, by name
    foreign: Mapping[str, list[int]]  # top features of other behaviours, by name


def _answers(results: BehaviourAblation) -> str:
    """What is said of a behaviour when all are done: answers are corrected for all of a run, and ask of the others."""
    found = {name: getattr(results.grades, name) for name in grades.GRADES}
    words = {True: "yes", False: "no", None: "not known"}
    if results.holds_again:
        found |= dict(holds_again=results.holds_again)
    return "; ".join(f"{name.replace('_', ' ')}: {words[grade.holds]}" for name, grade in found.items())


def _test_and_save(run: Run, experiment: ModelExperiment, config: AblateConfig, beside: Beside) -> BehaviourAblation:
    model, split, dictionary, text, others, trainings, foreign = beside
    results, measured = verdict.judge(experiment.name, experiment, config, foreign)
    results, scores = _with_sets(results, experiment, measured, config)
    if text and measured.top:
        effect = text.effects(split, experiment.replacement, [measured.top]).summary(config)
        results = dataclasses.replace(results, text=effect)
    if config.baselines:
        curves = dose.compare(experiment, measured.top, split, model, dictionary, text, config)
        results = dataclasses.replace(results, doses=curves)
    if trainings:
        results = dataclasses.replace(results, repeats=repeats.measure_repeats(experiment, model, trainings, config))
    assert results.claim
    results = grades.graded(results, results.claim, config)
    if config.effects == "all":
        importance, drop_NxP = measure_importance(experiment, config)
        halves = stability.between_halves(drop_NxP, config.seed)
        summary = importance.summary(config.top, halves, least_p(len(experiment.test), PERMUTATIONS))
        if others:
            pairs = agreement.measure_agreement(experiment, importance, model, dictionary, others, config)
            summary = dataclasses.replace(summary, agreement=pairs)
        results = dataclasses.replace(results, importance=summary)
        if is_first_process():
            importance.save(importance.file(run.folder, experiment.name))
            save_drops(run.folder, experiment.name, drop_NxP)
    if is_first_process():
        _save_scores(run, experiment, measured, scores)
    return results


def _saved_effects(run: Run, name: str, result: BehaviourAblation) -> grades.SavedEffects:
    """What the answers rest on, from the scores that a behaviour's part wrote."""
    lines = read_lines(parts.part_file(run, name, "-prompts.jsonl"))
    clean_P, joint_P, template_P = (np.array([line[of] for line in lines]) for of in ("clean", "joint", "template"))
    chosen_Q = np.array([p for p, line in enumerate(lines) if line["draws"] is not None])
    draws_QxN = np.array([lines[p]["draws"] for p in chosen_Q])
    own = clean_P[chosen_Q], joint_P[chosen_Q], draws_QxN.T, template_P[chosen_Q]
    others = {other: np.array([line["others"][other] for line in lines]) for other in lines[0]["others"]}
    effects = SetEffects.of(*own, result.controls.disjoint_sets)
    return grades.SavedEffects(effects, clean_P, joint_P, template_P, others)


def _save_scores(
    run: Run,
    experiment: ModelExperiment,
    measured: verdict.JudgedDiffs,
    scores: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Writes the logit difference of every test prompt under every removal, and the drawn sets."""
    beside = dict(
        controls=(measured.controls_NxC, measured.controls_NxQ), draws=(measured.draws_MxC, measured.draws_MxQ)
    )
    place = {int(p): q for q, p in enumerate(measured.chosen_Q)}

    def at_prompt(kinds: Mapping[str, np.ndarray], p: int) -> dict[str, list] | None:
        """The scores of a prompt, of those that were measured on it."""
        everywhere = all(score.shape[-1] == len(experiment.test) for score in kinds.values())
        if not everywhere and p not in place:
            return None
        return {of: score[..., p if everywhere else place[p]].tolist() for of, score in kinds.items()}

    by_prompt = [
        dict(
            text=prompt.text,
            correct=prompt.correct,
            wrong=prompt.wrong,
            template=prompt.template,
            clean=float(measured.clean_P[p]),
            joint=float(measured.joint_P[p]),
            top=measured.top_KxP[:, p].tolist(),
            **{kind: diff_NxQ[:, place[p]].tolist() if p in place else None for kind, (_, diff_NxQ) in beside.items()},
            others={other: float(left_P[p]) for other, left_P in measured.others.items()},
            **{test: at_prompt(kinds, p) for test, kinds in scores.items()},
        )
        for p, prompt in enumerate(experiment.test)
    ]
    sets = [
        dict(kind=kind, draw=n, features=features_C.tolist())
        for kind, (sets_NxC, _) in beside.items()
        for n, features_C in enumerate(sets_NxC)
    ]
    write_lines(parts.part_file(run, experiment.name, "-prompts.jsonl"), by_prompt)
    write_lines(parts.part_file(run, experiment.name, "-controls.jsonl"), sets)


def _with_sets(
    results: BehaviourAblation, experiment: ModelExperiment, measured: verdict.JudgedDiffs, config: AblateConfig
) -> tuple[BehaviourAblation, dict[str, dict[str, np.ndarray]]]:
    """The results with those of sets, as far as they were asked for, and the scores behind them, prompts last."""
    scores: dict[str, dict[str, np.ndarray]] = {}
    if config.curve:
        curve = nested.cumulative_curve(experiment, measured)
        results = dataclasses.replace(results, curve=curve.summary(config))
        scores["curve"] = dict(top=curve.top_SxP, controls=curve.controls_ExNxP)
    if config.greedy:
        grown = nested.grow(experiment, measured.attribution_F, config.greedy)
        results = dataclasses.replace(results, greedy=grown.summary(config))
        scores["greedy"] = dict(greedy=grown.greedy_NxP, top=grown.top_NxP)
    if config.circuit_tests:
        circuit, of_circuit = test_circuit(experiment, measured.top, config)
        sizes = measure_sizes(experiment, measured.attribution_F, config)
        results = dataclasses.replace(results, circuit=dataclasses.replace(circuit, sizes=sizes))
        scores["circuit"] = of_circuit.by_kind if of_circuit else {}
    return results, scores
