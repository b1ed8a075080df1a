"""The stage ``study``: what removing a dictionary's top features does to the model's score on a benchmark.

Half of the items, chosen by seed, choose the top features by attribution of the reference answer's log-likelihood
(``references``); the other half is scored without an edit, with these features set to zero, with each replaced, where
it fires, by its activation somewhere else (``Dictionary.redraw``, other draws for every item), and the same with
matched random features in their place. ``scores`` says what that means.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saejax.causal.parts import Progress, load_run_dictionary, load_run_model
from saejax.causal.study import scores as judgement
from saejax.causal.study.features import choose_features, edits_of, measure_activations
from saejax.causal.study.items import EditsOf, ItemScores, unedited
from saejax.causal.study.removal import measure_single
from saejax.causal.study.results import (
    ChosenFeatures,
    ImportantFeature,
    ItemScore,
    SingleEffects,
    StudyItems,
    StudyResults,
)
from saejax.causal.study.scores import CLEAN, Scored
from saejax.causal.study.single import line
from saejax.errors import Interrupted, UserError
from saejax.files import read_json, read_lines, write_json, write_lines
from saejax.interventions.split_model import SplitModel
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run
from saejax.settings import StudyConfig, TaskConfig
from saejax.tasks.benchmark_definitions import Item, way
from saejax.tasks.benchmarks import origin, read_items

ITEMS, FEATURES, RANKING = "items.jsonl", "features.json", "feature_importance_ranking.json"
CONDITIONS = "conditions"  # folder of the rows of each, until all are scored
SINGLE = "single"  # folder of what was measured feature by feature


def run_study(run: Run) -> StudyResults:
    """Scores the benchmark named ``run.name`` with and without the top features of a dictionary.

    ``items.jsonl`` has a line for each test item under each condition, from which every figure can be derived again,
    ``features.json`` what was replaced, and with what, and ``feature_importance_ranking.json`` all features that fire,
    the largest attribution first, the top ones with what each does by itself. All are kept as soon as they are there: a
    run that was killed goes on with the next condition.

    Raises:
      UserError: there are too few items, the dictionary belongs to another model, an item is longer than the model's
        context, or something is not finite.
      Interrupted: asked to stop; conditions that were finished are kept.
    """
    config = run.configs[StudyConfig]
    task = run.configs[TaskConfig]
    score = way(run.name, task)
    train, test = halves(read_items(run.name, task), config, run.name)
    dictionary, lm = load_run_dictionary(run), load_run_model(run)

    def check_stop() -> None:
        if run.stopping():
            raise Interrupted(f"{run.name}: stopped; conditions that were finished are kept")

    split, items = SplitModel(lm, dictionary), ItemScores(lm, run.name, task, check_stop)
    conditions = _Conditions(run, items, test)
    chance = float(np.mean([1 / len(item.choices) for item in test])) if score == "choice" else 0.0
    accuracy = _score_clean(run, conditions, chance, score)
    chosen = _choose(run, lambda: choose_features(split, items, train, test, config, run.name, check_stop))
    firing = sum(entry.firing_rate > 0 for entry in chosen.top)
    run.say(f"{len(chosen.top)} top features, of which {firing} fire on the test items")
    length = items.longest(test)

    def edits(condition: str) -> EditsOf:
        return functools.partial(edits_of, dictionary, chosen, condition, length, config)

    conditions.score(judgement.conditions(config.draws)[1:], edits, accuracy)
    conditions.write()
    judged = judgement.judge(conditions.rows, chance, config, chosen.disjoint)
    run.say(judged.reason)
    results = StudyResults(
        **{field.name: getattr(judged, field.name) for field in dataclasses.fields(judged)},
        dictionary=config.dictionary,
        site=dictionary.site,
        rule=judgement.rule(config),
        score=score,
        items=StudyItems(train=len(train), test=len(test)),
        chance=chance,
        top=chosen.top,
        controls=chosen.controls,
        match=chosen.match,
        origin=str(origin(run.name, task)),
        disjoint=chosen.disjoint,
        single=_measure_single(run, split, items, test, chosen, accuracy and score == "choice"),
        activations=measure_activations(split, items.solutions(test), config, check_stop),
    )
    shutil.rmtree(run.folder / CONDITIONS)  # last, so that a run that is killed until then has them
    return results


def _choose(run: Run, choose: Callable[[], tuple[ChosenFeatures, Sequence[ImportantFeature]]]) -> ChosenFeatures:
    """The features that are tested, chosen by one process, and read back: a run that goes on has the same numbers."""
    path = run.folder / FEATURES

    def make(_: str) -> None:
        found, ranking = choose()
        write_json(run.folder / RANKING, to_json(ranking))
        write_json(path, to_json(found))

    run.each([FEATURES], lambda _: path, make, last=False)
    return from_json(ChosenFeatures, read_json(path), path)


def _score_clean(run: Run, conditions: "_Conditions", chance: float, score: str) -> bool:
    """Scores the items without an edit, and says whether accuracies are to be compared at all."""
    accuracy = score != "likelihood"
    conditions.score([CLEAN], lambda _: unedited, accuracy, last=False)
    if not accuracy or not judgement.at_chance(conditions.rows[CLEAN], chance):
        return accuracy
    accuracy = run.configs[StudyConfig].even_at_chance
    further = "" if accuracy else " Only log-likelihoods are compared; --study.even_at_chance measures accuracy, too."
    run.say(judgement.chance_reason(conditions.rows[CLEAN], chance) + further)
    return accuracy


def _measure_single(
    run: Run, split: SplitModel, items: ItemScores, test: Sequence[Item], chosen: ChosenFeatures, choices: bool
) -> SingleEffects | None:
    """What each feature does by itself, if that was asked for, written into the file of all features too."""
    config = run.configs[StudyConfig]
    if not config.single:
        return None
    on_progress = Progress(run, "removals").of_part(f"study: {run.name}, feature by feature", 0)
    # Choices alone are judged: to generate answers without each feature would take days.
    single = measure_single(split, items, test, chosen, config, choices, run.folder / SINGLE, on_progress)
    if single:
        run.say(line(single))
        _rank(run.folder / RANKING, single)
    return single


def _rank(path: Path, single: SingleEffects) -> None:
    """Writes effects of single features into the file of all features."""
    effects = {one.feature: one for one in single.features}
    ranking = from_json(tuple[ImportantFeature, ...], read_json(path), path)
    write_json(path, to_json([dataclasses.replace(one, single=effects.get(one.feature)) for one in ranking]))


def halves(items: Sequence[Item], config: StudyConfig, name: str) -> tuple[list[Item], list[Item]]:
    """The items that choose features and those that judge them, drawn by seed; the second half is not the smaller one.

    Raises:
      UserError: there are fewer than two.
    """
    if len(items) < 2:
        raise UserError(f"{name} has {len(items)} items for --study: expected at least 2; raise --task.examples")
    items = items[: config.items]
    order = np.random.default_rng([config.seed, *name.encode()]).permutation(len(items))
    half = len(items) // 2
    return [items[i] for i in order[:half]], [items[i] for i in order[half:]]


class _Conditions:
    """The rows of the test items under each condition, kept on disk as soon as they are there."""

    def __init__(self, run: Run, items: ItemScores, test: Sequence[Item]):
        self._run, self._items, self._test = run, items, test
        self.rows: dict[str, Scored] = {}
        (run.folder / CONDITIONS).mkdir(exist_ok=True)

    def score(
        self, conditions: Sequence[str], edits_of: Callable[[str], EditsOf], accuracy: bool, last: bool = True
    ) -> None:
        """Scores conditions, but for those that an earlier run kept.

        Args:
          conditions: their names.
          edits_of: gives the edits of one, given the items of a batch's texts.
          accuracy: whether answers are judged, or log-likelihoods of the references alone measured.
          last: whether there are no others.
        """

        def make(condition: str) -> None:
            edits = edits_of(condition)
            if condition != CLEAN and not edits([0]):  # no features, no change
                same = [dataclasses.replace(row, condition=condition) for row in self.rows[CLEAN]]
                own = same if accuracy else [dataclasses.replace(row, answer=None, correct=None) for row in same]
            else:
                own = self._items.score(condition, self._test, edits, accuracy)
            write_lines(self._file(condition), map(to_json, own))
            self._run.say(f"{condition}: {_line(own)}")

        self._run.each(conditions, self._file, make, last)
        for condition in conditions:
            self.rows[condition] = read_scores(self._file(condition)).get(condition, [])

    def write(self) -> None:
        """Writes all rows into one file."""
        write_lines(self._run.folder / ITEMS, (to_json(row) for rows in self.rows.values() for row in rows))

    def _file(self, condition: str) -> Path:
        return self._run.folder / CONDITIONS / f"{condition.replace('/', '-')}.jsonl"


def _line(rows: Scored) -> str:
    nats = f"log-likelihood per token {judgement.nats_per_token(rows).mean():.3f} nats"
    if not judgement.are_judged(rows):
        return nats
    return f"accuracy {100 * judgement.accuracies(rows).mean():.1f} %, {nats}"


def read_scores(path: Path) -> dict[str, list[ItemScore]]:
    """The rows of ``items.jsonl``, by condition; none if it is not there."""
    found: dict[str, list[ItemScore]] = {}
    for fields in read_lines(path) if path.exists() else ():
        row = from_json(ItemScore, fields, path)
        found.setdefault(row.condition, []).append(row)
    return found
