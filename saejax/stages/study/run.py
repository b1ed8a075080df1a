"""The stage ``study``: do a dictionary's features cause the answers to a benchmark?

1. Half of the items, drawn by seed, choose features; the other half judge them.
2. Log-likelihoods of the reference answers are measured by one process (``benchmark.measure_benchmark``).
3. Answers are scored under each condition (``benchmark.scored_conditions``), which several processes divide among them.
4. Both become the unit's effects table, of which the verdict is a pure function.

The log-likelihoods, once all are measured, and the answers of each condition are kept: a killed run continues there.
"""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from saejax.dictionaries import Dictionary
from saejax.errors import Interrupted
from saejax.files import read_json, read_lines, write_json, write_lines
from saejax.interventions import bases
from saejax.interventions.ablation import verdict_config
from saejax.interventions.benchmark import (
    SCORED,
    BenchmarkItems,
    ablate_config,
    answer_table,
    edits_of,
    scored_conditions,
)
from saejax.interventions.falsify import Falsification
from saejax.interventions.settings import StudyConfig
from saejax.interventions.table import READOUTS, EffectsTable, has_effects, load_effects, merge_tables, save_effects
from saejax.interventions.verdict import verdict
from saejax.matching.importance import ItemFeatures
from saejax.results import from_json, to_json
from saejax.runner import stacks
from saejax.runner.workspace import Run
from saejax.stages.inputs import load_run_dictionary, load_run_model, run_mesh
from saejax.stages.study.measure import (
    FEATURES,
    FEATURES_ON_ITEMS,
    MEASURED,
    falsify_top,
    measure_items,
    read_benchmark,
)
from saejax.stages.study.results import AnswerScores, ChosenFeatures, StudyItems, StudyResults
from saejax.statistics.intervals import wilson
from saejax.statistics.ranks import rank_p
from saejax.studies.associations import RIGHT, BenchmarkAssociations, associate, item_activations
from saejax.studies.primitives import judge_domains, judge_primitives
from saejax.tasks.benchmark_definitions import Item, way
from saejax.tasks.benchmarks import origin
from saejax.tasks.scored_items import WAYS, ScoredItem
from saejax.tasks.settings import TaskConfig
from saejax.wording import counted

FALSIFIED = "falsification.json"
ANSWERS = "answers"  # folder of the scored answers, a file for each condition
_CHANGED = 0.1  # share of answers that change under ablation, for what is said about power
_ACCURACY = READOUTS.index("accuracy")
_GROUPS = ("clean", "top", "resample", *SCORED)


def run_study(run: Run) -> StudyResults:
    """Measure the benchmark named ``run.name`` with and without the top features of a dictionary.

    ``effects.parquet`` and its definitions hold every measured value, ``answers/<condition>.jsonl`` the scored answers,
    ``features.json`` the top features and the activations from which they are resampled,
    ``feature_importance_ranking.json`` all features that fire, the largest attribution first, ``item_attribution.npz``
    the attribution of each feature for each item, and, if it was asked for, ``falsification.json`` what drives the top
    features.

    Args:
      run: the unit.

    Returns:
      The results of the unit.

    Raises:
      UserError: there are too few items, the dictionary belongs to another model, an item is longer than the model's
        context, or something is not finite.
      Interrupted: asked to stop; what was measured is kept.
    """
    config, task = run.configs[StudyConfig], run.configs[TaskConfig]
    score = way(run.name, task)
    dictionary, mesh = load_run_dictionary(run), run_mesh(run)
    repeats = {name: stacks.load_trained(name, run.inputs, "--study.repeats", mesh) for name in config.repeats}
    lm = load_run_model(run, dictionary.config, *(repeat.config for repeat in repeats.values()))
    items = read_benchmark(run.name, lm, task, config)
    train, test = items.train, items.test
    if config.min_accuracy_drop:
        run.say(f"{run.name}: {describe_power(len(test), config.min_accuracy_drop)}")

    run.make_each(
        [FEATURES], lambda name: run.folder / name, lambda _: measure_items(run, items, dictionary, repeats), last=False
    )
    # A run that was killed while it removed what was measured has left the whole table, answers included.
    is_merged = has_effects(run.folder)
    table = load_effects(run.folder if is_merged else run.folder / MEASURED)
    chosen: ChosenFeatures = from_json(ChosenFeatures, read_json(run.folder / FEATURES), run.folder / FEATURES)
    if config.falsify:

        def refute(_: str) -> None:
            write_json(run.folder / FALSIFIED, to_json(falsify_top(run, items, dictionary, chosen, config)))

        run.make_each([FALSIFIED], lambda name: run.folder / name, refute, last=False)
    chance = float(np.mean([1 / len(item.choices) for item in test])) if score == "choice" else 0.0
    answers, at_chance = _score_answers(run, items, dictionary, chosen, table, chance)
    run.make_each([], lambda _: run.folder, lambda _: None)  # the other processes leave the stage here
    table = table if is_merged else merge_tables([table, *answers])
    judged = verdict(table, verdict_config(ablate_config(config)))
    if not is_merged:
        save_effects(run.folder, table)
    clean_P = table.clean_values(table.select_prompts(run.name), "answer_log_prob")
    results = StudyResults(
        dictionary=config.dictionary,
        site=dictionary.config.target or dictionary.site,
        k=len(chosen.top),
        rule=judged.rule,
        score=score,
        items=StudyItems(train=len(train), test=len(test)),
        log_likelihood=float(clean_P.mean()),
        log_likelihood_spread=float(clean_P.std(ddof=1)),
        chance=chance,
        at_chance=at_chance,
        top=chosen.top,
        verdict=judged,
        scores=summarize_scores(table, run.name),
        origin=str(origin(run.name, task)),
        categories={item.id: item.categories for item in (*train, *test)},
        activations=chosen.activations,
        primitives=dataclasses.replace(
            chosen.primitives,
            effects=judge_primitives(
                table,
                run.name,
                chosen.primitives.primitives,
                {f"{run.name}/{item.id}": item.categories for item in test},
                config.bootstrap,
                config.seed,
            ),
        ),
        associations=_associate(run.folder, items, chosen, table, config.seed),
        domains=judge_domains(table, run.name, config.bootstrap, config.seed) or None,
        falsification=(
            from_json(Falsification, read_json(run.folder / FALSIFIED), run.folder / FALSIFIED)
            if config.falsify
            else None
        ),
    )
    for result in judged.dictionaries["tested"].values():
        for answer in (*result.ablation.values(), result.random, result.placebo, result.trained):
            run.say(f"{run.name}: {answer.sentence}")
    shutil.rmtree(run.folder / MEASURED, ignore_errors=True)  # last, so that a run that is killed until then has it
    return results


def describe_power(items: int, drop: float) -> str:
    """Return how often some items show a fall of accuracy above zero, and how many show it in 80 % of cases.

    Of the answers ``_CHANGED`` are assumed to change under ablation, so that the change of an item has the standard
    deviation sqrt(changed - drop^2). Shown means that the 95 % interval lies above zero.

    Args:
      items: how many judge.
      drop: the true fall, a share above 0.
    """
    spread = math.sqrt(max(_CHANGED, drop) - drop**2) or 1e-9  # none where all answers change from right to wrong
    power = ndtr(drop / spread * math.sqrt(items) - ndtri(0.975))
    needed = math.ceil(((ndtri(0.975) + ndtri(0.8)) * spread / drop) ** 2)
    return (
        f"if ablation truly lowers accuracy by {100 * drop:g} points and changes {100 * max(_CHANGED, drop):g} % of "
        f"the answers, {items} test items show a fall above zero in {100 * power:.0f} % of cases, and "
        f"{needed:,} in 80 %"
    )


def _associate(
    folder: Path, items: BenchmarkItems, chosen: ChosenFeatures, table: EffectsTable, seed: int
) -> BenchmarkAssociations | None:
    """Return associations of features with categories and right answers; None where activity was not saved."""
    if not (folder / FEATURES_ON_ITEMS).exists():
        return None
    read = ItemFeatures.load(folder / FEATURES_ON_ITEMS)
    every, half = [*items.train, *items.test], len(items.train)
    acts_PxF = question_activations(read, every)
    prompts = table.select_prompts(items.name)  # ordered by id
    place = {f"{items.name}/{item.id}": half + number for number, item in enumerate(items.test)}
    test_Q = np.array([place[prompt.id] for prompt in prompts])
    names = sorted({name for item in every for name in item.categories})
    labels = {name: np.array([name in item.categories for item in every]) for name in names}
    test_labels = {name: has_P[test_Q] for name, has_P in labels.items()}
    right_Q = table.clean_values(prompts, "accuracy")
    if np.isfinite(right_Q).all():
        test_labels[RIGHT] = right_Q > 0
    singles = table.select_edits(items.name, "single")
    drop_KxQ = table.drops(singles, prompts, "answer_log_prob")
    drops = {edit.features[0]: drop_Q for edit, drop_Q in zip(singles, drop_KxQ, strict=True)}
    tested = [effect.feature for effect in chosen.top]
    train_labels = {name: has_P[:half] for name, has_P in labels.items()}
    return associate(acts_PxF[:half], train_labels, acts_PxF[test_Q], test_labels, tested, drops, seed)


def question_activations(read: ItemFeatures, items: Sequence[Item]) -> np.ndarray:
    """Return the activation of largest size of each feature on each item's question, [P, F].

    The solution is left out: its signs, such as "+", give the category away.

    Args:
      read: features on the questions and solutions.
      items: P, in the order in which they were read.
    """
    length_P = np.array([len(item.question) for item in items])
    is_question_N = read.end_N <= length_P[read.text_N]
    return item_activations(read.activity.f_NxF[is_question_N], read.text_N[is_question_N], len(items))


def _score_answers(
    run: Run, items: BenchmarkItems, dictionary: Dictionary, chosen: ChosenFeatures, table: EffectsTable, chance: float
) -> tuple[list[EffectsTable], bool | None]:
    """Score the items under every condition; the answers of each are kept on disk as soon as they are there.

    Args:
      run: the unit.
      items: the items.
      dictionary: the tested one.
      chosen: the top features, and from what they are resampled.
      table: measured log-likelihoods.
      chance: the accuracy of guessing; 0 of generated answers.

    Returns:
      The rows of the effects table, and whether the unedited model is no better than chance; None where accuracy is not
      measured. At chance, accuracies under edits are not measured.
    """
    name, config = run.name, run.configs[StudyConfig]
    usual_way, conditions = way(name, run.configs[TaskConfig]), scored_conditions(table, name, config.scored_sets)
    pools, length, tables = dict(chosen.pools), items.longest(), list[EffectsTable]()
    (run.folder / ANSWERS).mkdir(exist_ok=True)

    def check_stop() -> None:
        if run.stopping():
            raise Interrupted(f"{name}: stopped; conditions that were finished are kept")

    def score(names: Sequence[str], scored: str, prefix: str = "") -> None:
        """Score conditions, except conditions that an earlier run kept."""

        def file(condition: str) -> Path:
            return run.folder / ANSWERS / f"{prefix}{condition}.jsonl"

        def make(condition: str) -> None:
            edit, basis = conditions[condition], dictionary
            if edit and edit.group == "untrained":
                basis = bases.untrained(dictionary, round(chosen.activations.l0), config.seed + edit.index)
            edits = edits_of(basis, edit, pools, length, config.seed)
            write_lines(file(condition), map(to_json, items.score(edits, scored, check_stop)))
            run.say(f"{name}: {prefix}{condition}: scored")

        run.make_each(names, file, make, last=False)
        for condition in names:
            rows: list[ScoredItem] = [
                from_json(WAYS[scored], fields, file(condition)) for fields in read_lines(file(condition))
            ]
            tables.append(answer_table(table, name, conditions[condition], rows))

    score(["resample"], "likelihood", "likelihood-")
    if usual_way == "likelihood":
        return tables, None
    score(["clean"], usual_way)
    right_N = tables[-1].value_N[tables[-1].readout_N == _ACCURACY]
    accuracy = wilson(right_N)
    at_chance = accuracy.low <= chance if chance else accuracy.mean == 0
    if at_chance:
        run.say(
            f"{name}: the unedited model is not shown to be above chance ({counted(len(right_N), 'item')}), so only "
            "log-likelihoods are compared"
        )
    else:
        score([condition for condition in conditions if condition != "clean"], usual_way)
    return tables, at_chance


def summarize_scores(table: EffectsTable, name: str) -> tuple[AnswerScores, ...]:
    """Return accuracy, format failures and cut-off answers without an edit, under T, and under control sets.

    Args:
      table: the effects table of a benchmark.
      name: the benchmark.

    Returns:
      One entry per group of edits that was scored; of control sets the means over all sets. Their p-value is that of
      the drop of accuracy under T among those under the sets.
    """
    prompts = table.select_prompts(name)
    clean_P = table.clean_values(prompts, "accuracy")
    if np.isnan(clean_P).any():
        return ()
    scores = []
    tested_drop: float | None = None
    for group in _GROUPS:
        edits = table.select_whole_edits(name, group)
        values = {
            readout: table.values(edits, prompts, readout) for readout in ("accuracy", "strict", "formatted", "cut")
        }
        scored_E = np.isfinite(values["accuracy"]).all(axis=1)
        if not scored_E.any():
            continue
        accuracy_SxP = values["accuracy"][scored_E]
        drop_S = (clean_P - accuracy_SxP).mean(axis=1)
        if group == "top":
            tested_drop = float(drop_S[0])
        shares = {key: float(value[scored_E].mean()) for key, value in values.items()}
        written = np.isfinite(shares["strict"])
        scores.append(
            AnswerScores(
                group=group,
                sets=int(scored_E.sum()),
                accuracy=shares["accuracy"],
                drop=float(drop_S.mean()),
                largest_drop=float(drop_S.max()),
                p_value=rank_p(tested_drop, drop_S) if group in SCORED and tested_drop is not None else None,
                strict=shares["strict"] if written else None,
                unformatted=1 - shares["formatted"] if written else None,
                cut=shares["cut"] if written else None,
            )
        )
    return tuple(scores)
