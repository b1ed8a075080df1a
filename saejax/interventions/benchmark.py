"""Measurements on a benchmark's items: the rows of the effects table, as ``ablation`` measures a behaviour's.

The effect of a set is the drop of the teacher-forced log-likelihood of the reference answer. Question 3 is about the
final answer: its log-probability after the solution up to it, minus a corrupted answer's of the same form, such
as another number of as many digits. A placebo target is a pair of corrupted answers of every item. Besides:

1. T is also resampled: where a feature fires, its activation is drawn from those where it fires on train items.
2. Answers are generated, or chosen among those given, and scored: without an edit, with T set to zero and resampled,
   and under some random lists, placebo sets and lists of untrained dictionaries. The flexible rule judges generated
   answers; the share in which the strict rule finds no answer, and the share cut off, are measured, too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.ablation import (
    BehaviourAblation,
    RowProgress,
    expected_rows,
    measure_behaviour,
    measure_controls,
    root_mean_square,
)
from saejax.interventions.answers import explain_no_top_features
from saejax.interventions.references import Reference, References, answer_pairs, attributions
from saejax.interventions.settings import AblateConfig, StudyConfig
from saejax.interventions.slopes import leaders
from saejax.interventions.split_model import SplitModel
from saejax.interventions.table import TESTED, EditDefinition, EffectsTable, PromptDefinition, merge_tables
from saejax.models.language_model import Edit, LanguageModel
from saejax.progress import OnProgress, silent
from saejax.tasks import benchmark_scores
from saejax.tasks.answers import corrupted_answers, find_final_answer
from saejax.tasks.benchmark_definitions import Item, answer_tokens, way
from saejax.tasks.benchmark_prompts import make_prompter
from saejax.tasks.likelihood import encode_pair
from saejax.tasks.scored_items import GeneratedItem, ReferenceItem, ScoredItem
from saejax.tasks.settings import TaskConfig

CORRUPTED = 8  # corrupted answers of an item, of which placebo targets are pairs
POOL = 256  # activations of a feature from which it is resampled
ITEMS = 16  # items scored between two checks whether to stop
ItemAblation = BehaviourAblation[References]


@dataclasses.dataclass(frozen=True)
class BenchmarkItems:
    """The items of a benchmark, encoded for a model."""

    lm: LanguageModel  #: the model
    name: str  #: the benchmark
    task: TaskConfig  #: how items are asked and scored
    train: Sequence[Item]  #: items that choose features
    test: Sequence[Item]  #: items that judge them

    def references(self, items: Sequence[Item]) -> list[Reference]:
        """Return each item's prompt and reference answer as token ids."""
        prompter = make_prompter(self.name, self.task, self.lm.tokenizer, self.lm.bos)
        pairs = (
            benchmark_scores.encode_answer(self.lm, prompter, item, prompter.prompt(item), item.solution)
            for item in items
        )
        return [Reference(*pair) for pair in pairs]

    def final_answers(self, items: Sequence[Item], seed: int) -> list[list[Reference]]:
        """Return for each item its final answer, then corrupted ones, each after the solution up to the answer.

        Empty where the solution does not hold the answer as it is, or no other answer has its form.
        """
        prompter, every = make_prompter(self.name, self.task, self.lm.tokenizer, self.lm.bos), []
        for item in items:
            start = find_final_answer(item.solution, item.answer)
            before = prompter.prompt(item) + prompter.delimiter + item.solution[:start]
            draws, is_formula = [seed, *item.id.encode()], self.name == "math"
            # Formulas take long to compare: none where the answer is not found.
            others = [] if start is None else corrupted_answers(item.answer, item.choices, CORRUPTED, draws, is_formula)
            texts = [item.answer, *others] if others else []
            pairs = [encode_pair(self.lm.tokenizer, before, text, prompter.bos) for text in texts]
            every.append([Reference(*pair) for pair in pairs if pair[1]])
        return every

    def definitions(self) -> list[PromptDefinition]:
        """Return the definitions of all items; items of held-out templates are a stratum of their own."""
        return [
            PromptDefinition(
                f"{self.name}/{item.id}",
                self.name,
                template="held-out wording" if item.held_out else "",
                held_out=item.held_out,
                split=split,
                text=item.question,
                correct=item.solution,
            )
            for split, items in (("train", self.train), ("test", self.test))
            for item in items
        ]

    def longest(self) -> int:
        """Return the number of tokens of the longest test item with its answer, or with what may be generated."""
        new = answer_tokens(self.name, self.task) if way(self.name, self.task) == "generate" else 0
        most = max((len(choice) for item in self.test for choice in item.choices), default=0)  # characters: enough
        references = self.references(self.test)
        return max(len(reference.context) + max(len(reference.answer), new, most) for reference in references)

    def score(
        self, edits: Callable[[Sequence[int]], Sequence[Edit]], scored: str, check_stop: Callable[[], None]
    ) -> list[ScoredItem]:
        """Return the score of every test item, in the way ``scored`` (generate, choice or likelihood).

        ``edits`` gives the edits of a batch of texts, given the item that each is of; ``check_stop`` may raise to stop.
        """
        # Few items at a time, so that a run that is asked to stop does so soon.
        step = self.task.batch if scored == "generate" else ITEMS
        rows: list[ScoredItem] = []
        for first in range(0, len(self.test), step):
            check_stop()
            items = self.test[first : first + step]
            # Every choice is a text of its own, and has its item's edits.
            texts = [len(item.choices) if scored == "choice" else 1 for item in items]
            item_of_text = np.repeat(np.arange(first, first + len(items)), texts).tolist()
            rows += benchmark_scores.score_items(self.lm, self.name, items, self.task, edits(item_of_text), scored)
        return rows


def ablate_config(config: StudyConfig) -> AblateConfig:
    """Return the settings of an ablation that a study makes."""
    names = ("top", "random_sets", "placebo_targets", "untrained_dictionaries", "baselines", "repeats")
    every = (*names, "min_accuracy_drop", "seed", "bootstrap")
    shared: dict[str, Any] = {name: getattr(config, name) for name in every}
    return AblateConfig(attribution_prompts=config.attribution_items, **shared)


@dataclasses.dataclass(frozen=True)
class MeasuredBenchmark:
    """Log-likelihoods of a benchmark's reference answers, and the dictionaries for further measurements."""

    items: BenchmarkItems  #: the items
    batch_tokens: int  #: tokens per batch
    tested: ItemAblation  #: the tested dictionary
    ablations: Mapping[str, ItemAblation]  #: this one, and dictionaries of other seeds by name
    table: EffectsTable  #: all that the verdict needs but accuracy
    placebo_RxF: np.ndarray  #: attribution of each feature of the tested dictionary for each placebo target wanted

    def choose_features(self, items: BenchmarkItems) -> list[int]:
        """Return the top features of another benchmark's train items, by the same attribution."""
        tested, config = self.tested, self.tested.config
        references = items.references(items.train[: config.attribution_prompts or len(items.train)])
        (rows_NxF,) = attributions([tested.split], references, self.batch_tokens, tested.progress.check)
        return leaders(rows_NxF.mean(axis=0, dtype=np.float64), config.top)

    def item_attributions(self) -> list[np.ndarray]:
        """Return the attribution of each feature for the answer to each item, train items first, float32 [P, F].

        Those of the dictionaries of other seeds follow the tested one's.
        """
        every = [*self.ablations.values()]
        # Those for the first train items, which chose features, are there already.
        new = [*self.items.train, *self.items.test][len(self.tested.train) :]
        splits, check_stop = [ablation.split for ablation in every], self.tested.progress.check
        rows_of = attributions(splits, self.items.references(new), self.batch_tokens, check_stop)
        pairs = zip(every, rows_of, strict=True)
        return [np.concatenate([ablation.train.attribution_NxF, rows_MxF]) for ablation, rows_MxF in pairs]

    def measure_group(
        self, group: str, features: Sequence[int], places: Sequence[int], controls: Sequence[str]
    ) -> EffectsTable:
        """Return the rows of a further set of features, and of controls of its dose on some items.

        Args:
          group: the set's name, the group of its edit.
          features: the set, ablated whole on all test items.
          places: of the test items on which it is compared with controls, by their order.
          controls: groups of controls, ``random`` and ``placebo``; they are measured on these items, under the names
            ``control_group`` gives.
        """
        tested, config = self.tested, self.tested.config
        whole = EditDefinition(tested.behaviour, group, features=tuple(map(int, features)))
        tables = [tested.table([whole], tested.norms([whole]))]
        if controls and len(places):
            references = self.items.references([self.items.test[place] for place in places])
            some = References(tested.split, references, self.batch_tokens, tested.progress.check)
            here = dataclasses.replace(tested, definitions=[tested.tests[place] for place in places], test=some)
            dose = root_mean_square(here.norms([whole])[0])
            if dose > 0:
                placebos = tested.placebos if "placebo" in controls else []
                counts = config.random_sets * ("random" in controls), config.placebo_targets
                tables += measure_controls(here, features, placebos, dose, counts, ending=control_group("", group))
        return merge_tables(tables)


def measure_benchmark(
    items: BenchmarkItems,
    dictionary: Dictionary,
    config: StudyConfig,
    repeats: Mapping[str, Dictionary] | None = None,
    on_progress: OnProgress = silent,
) -> MeasuredBenchmark:
    """Measure log-likelihoods of the reference answers: all that the verdict needs but accuracy.

    Args:
      items: the items.
      dictionary: the tested one.
      config: settings of the study.
      repeats: dictionaries of other seeds, by name.
      on_progress: called with rows done and expected; may raise to stop.

    Raises:
      UserError: a dictionary does not fit the model, or no feature has an attribution above zero.
    """
    settings, definitions = ablate_config(config), items.definitions()
    rows = expected_rows(settings, cast(Any, {items.name: definitions}), items.name, dictionary.config.n_features)
    progress, split = RowProgress(on_progress, rows), SplitModel(items.lm, dictionary)
    # Train items alone choose features; test items judge them.
    choosing = items.train[: settings.attribution_prompts or len(items.train)]
    train, test = (
        References(split, items.references(some), config.batch_tokens, progress.check)
        for some in (choosing, items.test)
    )
    tested = BehaviourAblation(dictionary, items.name, settings, progress, definitions, train, test)
    if not tested.top():
        raise UserError(explain_no_top_features([items.name]))
    ablations = {TESTED: tested} | {name: tested.with_basis(repeat) for name, repeat in (repeats or {}).items()}
    answers = items.final_answers(choosing, config.seed) if config.placebo_targets else []
    corrupted = [some[1:] for some in answers if len(some) > 2]  # two make a pair
    targets_of = _attribute_pairs(corrupted, [*ablations.values()], config.batch_tokens)
    for ablation, target_MxF in zip(ablations.values(), targets_of, strict=True):
        sets = [leaders(attribution_F, config.top) for attribution_F in target_MxF]
        ablation.placebos = [(None, members) for members in sets if members]
    table = measure_behaviour(ablations)
    table = merge_tables([table, *_measure_margins(items, table, ablations, config.batch_tokens)])
    # More were chosen than are wanted.
    placebo_RxF = targets_of[0][: config.placebo_targets]
    return MeasuredBenchmark(items, config.batch_tokens, tested, ablations, table, placebo_RxF)


def _attribute_pairs(
    corrupted: Sequence[Sequence[Reference]], ablations: Sequence[ItemAblation], batch_tokens: int
) -> list[np.ndarray]:
    """Return each feature's attribution for M pairs of corrupted answers, float64 [M, F], of each dictionary."""
    config, progress, splits = ablations[0].config, ablations[0].progress, [ablation.split for ablation in ablations]
    # More than are wanted: sets that would have to be scaled too far are left out.
    targets = answer_pairs(list(map(len, corrupted)), 2 * config.placebo_targets, config.seed)
    if not targets:
        return [np.zeros((0, split.dictionary.config.n_features)) for split in splits]
    flat = [reference for some in corrupted for reference in some]
    # Attribution is linear in the target: a pair's is the difference of both answers'.
    weight_MxR = np.zeros((len(targets), len(flat)))
    for weight_R, (first_N, second_N) in zip(weight_MxR, targets, strict=True):
        weight_R[first_N], weight_R[second_N] = 1 / len(corrupted), -1 / len(corrupted)
    sums = attributions(splits, flat, batch_tokens, progress.check, weight_MxN=weight_MxR)
    progress.of_call(len(flat))(1, 1)
    return sums


def _measure_margins(
    items: BenchmarkItems, table: EffectsTable, ablations: Mapping[str, ItemAblation], batch_tokens: int
) -> list[EffectsTable]:
    """Measure the final answer's margin over a corrupted one under T and placebo sets, where the answer has one."""
    (tested, *_), tables = ablations.values(), []
    answers = items.final_answers(items.test, tested.config.seed)
    places = [place for place, some in enumerate(answers) if len(some) > 1]
    for name, ablation in ablations.items() if places else ():
        right, corrupted = (
            References(
                ablation.split, [answers[place][which] for place in places], batch_tokens, ablation.progress.check
            )
            for which in (0, 1)
        )
        tests = [ablation.tests[place] for place in places]
        for edits in table.select_edits(items.name, "top", name)[-1:], table.select_edits(items.name, "placebo", name):
            if edits:
                some = ablation.edits(edits)
                margin_ExN = right.log_likelihoods(some) - corrupted.log_likelihoods(some)
                tables.append(EffectsTable.block([ablation.clean, *edits], tests, dict(answer_margin=margin_ExN)))
    return tables


def control_group(kind: str, group: str) -> str:
    """Return the group of the controls of a further set.

    Args:
      kind: "random" for its lists, "placebo" for its sets, or "pool" for their pool.
      group: the further set's own group.
    """
    return f"{kind} of {group}"


#: Groups of control sets under which answers are scored, some sets of each.
SCORED = ("random", "placebo", "untrained")
#: A condition under which answers are scored: its edit, or None for the unedited model.
Conditions = dict[str, EditDefinition | None]


def scored_conditions(table: EffectsTable, name: str, sets: int) -> Conditions:
    """Return the conditions under which answers are scored, the unedited model first.

    Args:
      table: measured log-likelihoods.
      name: the benchmark.
      sets: number of control sets of each group in ``SCORED``.
    """
    (top,) = table.select_whole_edits(name, "top")
    conditions: Conditions = {"clean": None, "top": top, "resample": dataclasses.replace(top, group="resample")}
    for group in SCORED:
        conditions |= {f"{group}-{edit.index}": edit for edit in table.select_whole_edits(name, group)[:sets]}
    return conditions


def edits_of(
    dictionary: Dictionary,
    edit: EditDefinition | None,
    pools: Mapping[int, Sequence[float]],
    length: int,
    seed: int,
) -> Callable[[Sequence[int]], Sequence[Edit]]:
    """Return the edits of a condition for a batch of texts, given the item that each text is of.

    Args:
      dictionary: the dictionary of the features.
      edit: the condition's edit; None: none.
      pools: activations from which features are resampled.
      length: tokens of the longest text.
      seed: seed of the draws; every item has draws of its own.
    """
    if edit is None:
        return lambda item_of_text: ()
    if edit.group == "resample":
        drawn_from = [pools[feature] for feature in edit.features]
        return lambda item_of_text: [dictionary.redraw(edit.features, drawn_from, length, seed, item_of_text)]
    # Controls are scaled to the dose of the top features.
    factor = 1 - edit.fraction
    scaled = dictionary.scale(edit.features, factor) if factor else dictionary.ablate(edit.features)
    return lambda item_of_text: [scaled]


def answer_table(
    table: EffectsTable, name: str, edit: EditDefinition | None, scored: Sequence[ScoredItem]
) -> EffectsTable:
    """Return the rows of a table that say how a condition's answers were scored, in the order of the test items.

    Args:
      table: the table of the benchmark, which has the clean edit and the items.
      name: the benchmark.
      edit: the condition's edit; None: the unedited model.
      scored: scores of its test items.

    Raises:
      UserError: an item has no score.
    """
    by_id = {f"{name}/{row.id}": row for row in scored}
    prompts = table.select_prompts(name)
    if missing := [prompt.id for prompt in prompts if prompt.id not in by_id]:
        raise UserError(f"the answer to {missing[0]} was not scored: delete the unit's folder and run the stage again")
    rows = [by_id[prompt.id] for prompt in prompts]
    if isinstance(rows[0], ReferenceItem):
        values = dict(answer_log_prob=[row.log_likelihood for row in cast(list[ReferenceItem], rows)])
    else:
        values = dict(accuracy=[float(bool(row.judged[1])) for row in rows])
    if isinstance(rows[0], GeneratedItem):
        written = cast(list[GeneratedItem], rows)
        values |= dict(
            strict=[float(row.strict.correct) for row in written],
            formatted=[float(row.strict.answer is not None) for row in written],
            cut=[float(row.finished == "length") for row in written],
        )
    block = {name: np.array([value], np.float64) for name, value in values.items()}
    return EffectsTable.block([edit or EditDefinition(name, "clean")], prompts, block)
