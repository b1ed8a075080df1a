"""The stage ``study``: what removing a dictionary's top features does to the model's score on a benchmark.

Half of the items, chosen by seed, choose the top features by attribution of the reference answer's log-likelihood
(``references``); the other half is scored without an edit, with these features set to zero, with each replaced, where
it fires, by its activation somewhere else (``Dictionary.redraw``), and the same with matched random features in their
place. ``study_scores`` says what that means.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.causal import study_scores
from saejax.causal.controls import draw_controls, match_ratios
from saejax.causal.references import Reference, References
from saejax.causal.screening import leaders
from saejax.causal.split import SplitModel
from saejax.causal.study_scores import CLEAN, Rows
from saejax.dictionaries import Dictionary, stacks
from saejax.errors import Interrupted, UserError
from saejax.models.language_model import Edit, LanguageModel, load_model
from saejax.parallel import make_mesh
from saejax.settings import StudyConfig, TaskConfig
from saejax.tasks import benchmark_scores
from saejax.tasks.benchmark_prompts import make_prompter
from saejax.tasks.benchmarks import Item, origin, read_items
from saejax.workspace import Run, read_json, write_json, write_text

ITEMS, FEATURES = "items.jsonl", "features.json"
_POOL = 256  # activations of a feature from which random replacements are drawn
_ITEMS = 16  # scored by log-likelihood between two looks whether to stop
_ADVICE = "lower --study.top or --study.matches, raise --study.items"


def run_study(run: Run) -> dict[str, Any]:
    """Scores the benchmark named ``run.name`` with and without the top features of a dictionary.

    ``items.jsonl`` has a line for each test item under each condition, from which every figure can be derived again,
    and ``features.json`` what was replaced, and with what. Both are kept as soon as they are there: a run that was
    killed goes on with the next condition.

    Returns:
      The results; WORKSPACE.md describes them.

    Raises:
      UserError: there are too few items, the dictionary belongs to another model, an item is longer than the model's
        context, or something is not finite.
      Interrupted: asked to stop; conditions that were finished are kept.
    """
    config: StudyConfig = run.configs["study"]
    score = benchmark_scores.way(run.name, run.configs["task"])
    train, test = halves(read_items(run.name, run.configs["task"]), config, run.name)
    kind, _ = stacks.kind_and_member(config.dictionary)
    dictionary = stacks.load_member(run.inputs[f"train/{kind}"], config.dictionary, "--study.dictionary")
    model_config = run.configs["model"]
    lm = load_model(model_config.path, model_config.revision, model_config.dtype, make_mesh(run.configs.get("mesh")))
    study = _Study(run, lm, dictionary, train, test)

    rows = study.scored({}, CLEAN, (), accuracy=score != "likelihood")
    chance = float(np.mean([1 / len(item.choices) for item in test])) if score == "choice" else 0.0
    accuracy = score != "likelihood"
    if accuracy and study_scores.at_chance(rows[CLEAN], chance, config):
        accuracy = config.even_at_chance
        further = (
            "" if accuracy else " Only log-likelihoods are compared; --study.even_at_chance measures accuracy, too."
        )
        run.say(study_scores.chance_reason(rows[CLEAN], chance, config) + further)
    chosen = study.features()
    for condition in study_scores.conditions(config.draws)[1:]:
        rows = study.scored(rows, condition, study.edits(chosen, condition), accuracy)
    results = study_scores.judge(rows, chance, config)
    run.say(results["reason"])
    return dict(
        dictionary=config.dictionary,
        site=dictionary.site,
        rule=study_scores.rule(config),
        score=score,
        items=dict(train=len(train), test=len(test)),
        chance=chance,
        **{key: chosen[key] for key in ("top", "controls", "match")},
        **results,
        origin=str(origin(run.name, run.configs["task"])),
    )


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


class _Study:
    """One benchmark, one dictionary: what is measured, and what of it is kept."""

    def __init__(
        self, run: Run, lm: LanguageModel, dictionary: Dictionary, train: Sequence[Item], test: Sequence[Item]
    ):
        self._run, self._lm, self._dictionary = run, lm, dictionary
        self._config: StudyConfig = run.configs["study"]
        self._task: TaskConfig = run.configs["task"]
        self._way = benchmark_scores.way(run.name, self._task)
        self._train, self._test = train, test
        self._kept = _read(run.folder / ITEMS)
        self._split = SplitModel(lm, dictionary)
        self._prompter = make_prompter(run.name, self._task, lm.tokenizer)
        self._references = [self._reference(place, item, item.solution) for place, item in enumerate(test)]

    def scored(self, rows: dict[str, Rows], condition: str, edits: Sequence[Edit], accuracy: bool) -> dict[str, Rows]:
        """``rows`` with those of a condition, kept from an earlier run or scored and written beside the others.

        Args:
          rows: of the conditions before.
          edits: the condition's.
          accuracy: whether answers are judged, or log-likelihoods of the references alone measured.
        """
        kept = self._kept.get(condition, [])
        if [row["id"] for row in kept] == [item.id for item in self._test]:
            return rows | {condition: kept}
        if condition != CLEAN and not edits:  # no features, no change
            own: Rows = [dict(row) | dict(condition=condition) for row in rows[CLEAN]]
            own = own if accuracy else [{key: row[key] for key in row if key not in _JUDGED} for row in own]
        else:
            own = [dict(condition=condition) | row for row in self._score(self._test, edits, accuracy)]
        rows = rows | {condition: own}
        write_text(self._run.folder / ITEMS, "".join(_json(row) for some in rows.values() for row in some))
        self._run.say(f"{condition}: {_line(own)}")
        return rows

    def features(self) -> dict[str, Any]:
        """The content of ``features.json``: the top features, the controls, and activations of both."""
        path = self._run.folder / FEATURES
        if path.exists():
            return read_json(path)
        config, name = self._config, self._run.name
        train = self._in_batches(self._objectives())
        attribution_F = train.attribution()
        top = leaders(attribution_F, config.top)
        statistics = self._in_batches(self._references).statistics()
        firing = [feature for feature in top if statistics.fires_at_all_F[feature]]
        seed = [config.seed, *name.encode()]
        controls_NxC = draw_controls(statistics, firing, config.draws, config.matches, seed, _ADVICE)
        replaced = sorted({*top, *controls_NxC.ravel().tolist()})
        solutions = [self._reference(place, item, item.solution) for place, item in enumerate(self._train)]
        pools = self._in_batches(solutions).pools(replaced, _POOL, config.seed)
        self._run.say(f"{len(top)} top features, of which {len(firing)} fire on the test items")
        entries = [
            dict(
                feature=feature,
                attribution=float(attribution_F[feature]),
                firing_rate=float(statistics.firing_rate_F[feature]),
                mean_activation=float(statistics.mean_activation_F[feature]),
            )
            for feature in top
        ]
        match = match_ratios(statistics, firing, controls_NxC)
        found = dict(top=entries, controls=controls_NxC.tolist(), match=match, pools=pools)
        write_json(path, found)
        return read_json(path)  # so that a run that goes on has the same numbers under the same keys

    def edits(self, chosen: dict[str, Any], condition: str) -> list[Edit]:
        """The edit of a condition; none if it has no features."""
        which, replacement = condition.split("/")
        if which == "top":
            features = [entry["feature"] for entry in chosen["top"]]
        else:
            features = chosen["controls"][int(which.removeprefix("control-"))]
        if not features:
            return []
        if replacement == "zero":
            return [self._dictionary.ablate(features)]
        pools = [chosen["pools"][str(feature)] for feature in features]
        return [self._dictionary.redraw(features, pools, self._lm.config.context, self._config.seed)]

    def _in_batches(self, references: Sequence[Reference]) -> References:
        return References(self._split, references, self._config.batch_tokens, self._check_stop)

    def _objectives(self) -> list[Reference]:
        """Of each train item its solution; of multiple choice the right choice, less the likeliest wrong one."""
        if self._way != "choice":
            return [self._reference(place, item, item.solution) for place, item in enumerate(self._train)]
        found = []
        rows = self._slices(self._train, (), self._task)
        for place, (item, row) in enumerate(zip(self._train, rows, strict=True)):
            wrong = [
                (total, choice)
                for total, choice in zip(row["log_likelihoods"], item.choices, strict=True)
                if choice != item.answer
            ]
            found += [
                self._reference(place, item, item.answer),
                self._reference(place, item, max(wrong)[1], sign=-1.0),
            ]
        return found

    def _reference(self, place: int, item: Item, answer: str, sign: float = 1.0) -> Reference:
        pair = benchmark_scores.encode_answer(self._lm, self._prompter, item, self._prompter.prompt(item), answer)
        return Reference(place, *pair, sign)

    def _score(self, items: Sequence[Item], edits: Sequence[Edit], accuracy: bool) -> list[dict[str, Any]]:
        """A row for each test item: its reference's log-likelihood and, where it is judged, its answer."""
        if accuracy and self._way == "choice":
            judged = self._slices(items, edits, self._task)
            totals = [row["log_likelihoods"][item.choices.index(item.answer)] for item, row in zip(items, judged)]
        else:
            judged = self._slices(items, edits, self._task) if accuracy else [{} for _ in items]
            likelihood = dataclasses.replace(self._task, score="likelihood")
            totals = [row["log_likelihood"] for row in self._slices(items, edits, likelihood)]
        tokens = [len(reference.answer) for reference in self._references]
        return [
            dict(id=item.id, log_likelihood=total, tokens=count) | _judged(row)
            for item, total, count, row in zip(items, totals, tokens, judged, strict=True)
        ]

    def _slices(self, items: Sequence[Item], edits: Sequence[Edit], task: TaskConfig) -> benchmark_scores.Rows:
        """``score_items``, with looks in between whether to stop."""
        step = task.batch if benchmark_scores.way(self._run.name, task) == "generate" else _ITEMS
        rows = []
        for first in range(0, len(items), step):
            self._check_stop()
            rows += benchmark_scores.score_items(self._lm, self._run.name, items[first : first + step], task, edits)
        return rows

    def _check_stop(self) -> None:
        if self._run.stopping():
            raise Interrupted(f"{self._run.name}: stopped; conditions that were finished are kept")


_JUDGED = ("answer", "correct")


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """The model's answer and whether it is right, by the strict or the raw rule; {} if none was asked for."""
    if "strict" in row:
        return dict(answer=row["output"], correct=row["strict"]["correct"])
    return dict(answer=row["raw"]["found"], correct=row["raw"]["correct"]) if "raw" in row else {}


def _line(rows: Rows) -> str:
    nats = f"log-likelihood per token {study_scores.nats_per_token(rows).mean():.3f} nats"
    judged = all("correct" in row for row in rows)
    return f"accuracy {100 * study_scores.accuracies(rows).mean():.1f} %, {nats}" if judged else nats


def _json(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of an interrupted run of the same settings, by condition."""
    found: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        # Not splitlines: answers may hold other line separators of Unicode.
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                row = json.loads(line)
                found.setdefault(row["condition"], []).append(row)
    return found
