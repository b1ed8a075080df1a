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
import functools
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
    root_mean_square,
)
from saejax.interventions.activity import FeatureStatistics
from saejax.interventions.answers import no_top_features
from saejax.interventions.controls import MIN_FIRING, Changes, choose_pool, control_edits
from saejax.interventions.edits import ZERO
from saejax.interventions.references import Reference, References, answer_pairs, attributions
from saejax.interventions.settings import AblateConfig, StudyConfig
from saejax.interventions.slopes import leaders
from saejax.interventions.split_model import SplitModel
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition, merge_tables
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
            # Formulas take long to compare: none where the answer is not found.
            others = [] if start is None else self._corrupted(item, seed)
            texts = [item.answer, *others] if others else []
            pairs = [encode_pair(self.lm.tokenizer, before, text, prompter.bos) for text in texts]
            every.append([Reference(*pair) for pair in pairs if pair[1]])
        return every

    def _corrupted(self, item: Item, seed: int) -> list[str]:
        is_formula = self.name == "math"
        return corrupted_answers(item.answer, item.choices, CORRUPTED, [seed, *item.id.encode()], is_formula)

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


@dataclasses.dataclass(kw_only=True)
class BenchmarkAblation(BehaviourAblation):
    """One dictionary, or another basis, on the items of one benchmark."""

    items: BenchmarkItems  #: the items
    batch_tokens: int  #: tokens per batch
    #: attribution of each feature for each placebo target, [F] each, once these were measured.
    placebo_attribution: list[np.ndarray] = dataclasses.field(default_factory=list, init=False)
    #: the other dictionaries whose placebo sets were chosen with this one's.
    sharing: "list[BenchmarkAblation]" = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self):
        config, train = self.config, self.items.train
        self.test = list(self.items.test)
        self.train = list(train[: config.attribution_prompts or len(train)])
        self.split, self.replacement = SplitModel(self.lm, self.basis), ZERO
        self._whole_references = self.items.references(self.test)
        self.test_references = self._references(self._whole_references)
        # Train items alone choose features; test items judge them.
        self._train_references = self.items.references(self.train)
        shared = self.like and self.like.split.point == self.split.point
        self.slopes = self.like.slopes if self.like and shared else self.answer_slopes()
        #: attribution of each feature for each train reference that chooses features
        self._train_rows_NxF = self._attributions(self._train_references, slopes_of=self.slopes)[0]
        self.attribution_F = self._train_rows_NxF.mean(axis=0, dtype=np.float64)
        self.like = None

    def answer_slopes(self) -> list[np.ndarray]:
        """Return slopes of the train references' log-likelihoods, which dictionaries of the site share."""
        return self._references(self._train_references).slopes()

    def changes(self, features: Sequence[int] | np.ndarray) -> Changes:
        """Return the changes that ablating some features makes on the test items."""
        return self.test_references.changes(features)

    def ranks(self, edit: EditDefinition) -> None:
        """Return nothing: answers of several tokens have no ranks beside them."""

    def keep(self, sets: Sequence[Sequence[int]]) -> None:
        """Return nothing: question 6 is about answers of one token."""

    def _references(self, references: Sequence[Reference]) -> References:
        return References(self.split, references, self.batch_tokens, self.progress.check)

    def _attributions(
        self, references: Sequence[Reference], splits: Sequence[SplitModel] = (), **options: Any
    ) -> list[np.ndarray]:
        """Return ``attributions`` of this dictionary and of those in ``splits``, with its options."""
        return attributions([self.split, *splits], references, self.batch_tokens, self.progress.check, **options)

    def measure(self, edits: Sequence[EditDefinition], full: bool = False) -> dict[str, np.ndarray]:
        """Return the log-likelihood of the reference answers, [1 + E, P]: without an edit, then with each edit."""
        on_progress = self.progress.of_call(len(edits) * len(self.test))
        values = dict(answer_log_prob=self.test_references.log_likelihoods(self.edits(edits), on_progress))
        chosen = [e for e, edit in enumerate(edits) if edit.group == "placebo" or edit == self._whole_top(edit)]
        if chosen and self._final_answers:
            places, right, corrupted = self._final_answers
            some = self.edits([edits[e] for e in chosen])
            margin_ExP = np.full((1 + len(edits), len(self.test)), np.nan)
            margin_AxN = right.log_likelihoods(some) - corrupted.log_likelihoods(some)
            margin_ExP[np.array([0, *(1 + e for e in chosen)])[:, None], places] = margin_AxN
            values["answer_margin"] = margin_ExP
        return values

    def _whole_top(self, edit: EditDefinition) -> EditDefinition | None:
        return edit if edit.group == "top" and edit.fraction == 1.0 else None

    @functools.cached_property
    def _final_answers(self) -> tuple[list[int], References, References] | None:
        """The test items whose final answer can be corrupted, with their right and corrupted answers; None: no item."""
        every = self.items.final_answers(self.test, self.config.seed)
        places = [place for place, answers in enumerate(every) if len(answers) > 1]
        if not places:
            return None
        right, corrupted = (self._references([every[place][which] for place in places]) for which in (0, 1))
        return places, right, corrupted

    def definitions(self) -> list[PromptDefinition]:
        """Return the definitions of all items."""
        return self.items.definitions()

    def norms(self, definitions: Sequence[EditDefinition]) -> np.ndarray:
        """Return the norm of each edit's change on each test item, [E, P]."""
        return self.test_references.change_norms(self.edits(definitions))

    @functools.cached_property
    def statistics(self) -> FeatureStatistics:
        """Firing statistics on the test items with their reference answers."""
        return self.test_references.statistics()

    def site_values(self) -> np.ndarray:
        """Return the site's values on the train items, [N, D]."""
        return np.concatenate([value_NxD for _, value_NxD in self._references(self._train_references).values()])

    def answer_means(self) -> np.ndarray:
        """Return no means: nearly every item has an answer of its own."""
        return np.zeros((0, 0))

    def choose_placebos(self, ablations: Sequence[BehaviourAblation]) -> None:
        """Choose the placebo sets of this dictionary, and of those in ``ablations``."""
        self.sharing = [cast(BenchmarkAblation, each) for each in ablations]
        every, wanted, seed = [self, *self.sharing], self.config.placebo_targets, self.config.seed
        answers = self.items.final_answers(self.train, seed) if wanted else []
        corrupted = [some[1:] for some in answers if len(some) > 2]  # two make a pair
        # More than are wanted: sets that would have to be scaled too far are left out.
        targets = answer_pairs(list(map(len, corrupted)), 2 * wanted, seed)
        for each in every:
            each._placebos = []
        if not targets:
            return
        flat = [reference for some in corrupted for reference in some]
        # Attribution is linear in the target: a pair's is the difference of both answers'.
        weight_MxR = np.zeros((len(targets), len(flat)))
        for weight_R, (first_N, second_N) in zip(weight_MxR, targets, strict=True):
            weight_R[first_N], weight_R[second_N] = 1 / len(corrupted), -1 / len(corrupted)
        sums = self._attributions(flat, [each.split for each in self.sharing], weight_MxN=weight_MxR)
        self.progress.of_call(len(flat))(1, 1)
        for each, mean_MxF in zip(every, sums, strict=True):
            sets = []
            for number, attribution_F in enumerate(mean_MxF):
                sets.append(leaders(attribution_F, self.config.top))
                if number < wanted:
                    each.placebo_attribution.append(attribution_F)
            each._placebos = [(None, members) for members in sets if members]

    def controls_of(self, whole: EditDefinition, places: Sequence[int], groups: Sequence[str]) -> EffectsTable:
        """Return the rows of control lists, and placebo sets, of a set's dose on some test items, measured there."""
        references = self._references([self._whole_references[place] for place in places])
        config, definitions = self.config, [self.tests[place] for place in places]
        dose = root_mean_square(references.change_norms(self.edits([whole]))[0])
        if not dose:
            return EffectsTable((), (), *np.zeros((4, 0), np.int64))

        def define(kind: str, members: Sequence[int], index: int, fraction: float, target: Any) -> EditDefinition:
            features = tuple(map(int, members))
            return EditDefinition(self.behaviour, control_group(kind, whole.group), index, features, fraction)

        firing_F = references.statistics().prompts_F
        pool = choose_pool(firing_F, len(places), whole.features, MIN_FIRING, config.seed)
        sets = self.placebo_sets() if "placebo" in groups else []
        counts = config.random_sets * ("random" in groups), config.placebo_targets
        not_run, *edits = control_edits(define, references.changes, pool, sets, dose, counts, config.seed)
        unmeasured = EffectsTable((not_run,), (), *np.zeros((4, 0), np.int64))
        if not edits:
            return unmeasured
        on_progress = self.progress.of_call(len(edits) * len(places))
        values = dict(answer_log_prob=references.log_likelihoods(self.edits(edits), on_progress))
        norm_ExP = references.change_norms(self.edits(edits))
        values["change_norm"] = np.vstack([0 * norm_ExP[:1], norm_ExP])
        return merge_tables([EffectsTable.block([self.clean, *edits], definitions, values), unmeasured])

    def choose_features(self, items: BenchmarkItems) -> list[int]:
        """Return the top features of another benchmark's train items, by the same attribution."""
        references = items.references(items.train[: self.config.attribution_prompts or len(items.train)])
        return leaders(self._attributions(references)[0].mean(axis=0, dtype=np.float64), self.config.top)

    def item_attributions(self, dictionaries: Sequence[Dictionary] = ()) -> list[np.ndarray]:
        """Return the attribution of each feature for the answer to each item, train items first, float32 [P, F].

        Args:
          dictionaries: some of ``sharing``, whose attributions follow the tested one's.
        """
        ablation_of = {id(each.basis): each for each in self.sharing}
        chosen = [self, *(ablation_of[id(dictionary)] for dictionary in dictionaries)]
        # Those for the first train items, which chose features, are there already.
        new = [*self.items.train, *self.items.test][len(self.train) :]
        rows_of = self._attributions(self.items.references(new), [each.split for each in chosen[1:]])
        pairs = zip(chosen, rows_of, strict=True)
        return [np.concatenate([each._train_rows_NxF, rows_MxF]) for each, rows_MxF in pairs]

    def pools(self, features: Sequence[int]) -> dict[int, list[float]]:
        """Return activations of each feature where it fires on train items, from which it is resampled."""
        return self._references(self._train_references).pools(features, POOL, self.config.seed)


def ablate_config(config: StudyConfig) -> AblateConfig:
    """Return the settings of an ablation that a study makes."""
    names = ("top", "random_sets", "placebo_targets", "untrained_dictionaries", "baselines", "repeats")
    every = (*names, "min_accuracy_drop", "seed", "bootstrap")
    shared: dict[str, Any] = {name: getattr(config, name) for name in every}
    return AblateConfig(attribution_prompts=config.attribution_items, **shared)


def measure_benchmark(
    items: BenchmarkItems,
    dictionary: Dictionary,
    config: StudyConfig,
    repeats: Mapping[str, Dictionary] | None = None,
    on_progress: OnProgress = silent,
) -> tuple[EffectsTable, BenchmarkAblation]:
    """Measure log-likelihoods of the reference answers: all that the verdict needs but accuracy.

    Args:
      items: the items.
      dictionary: the tested one.
      config: settings of the study.
      repeats: dictionaries of other seeds, by name.
      on_progress: called with rows done and expected; may raise to stop.

    Returns:
      The table, and the tested dictionary's ablation for further measurements.

    Raises:
      UserError: a dictionary does not fit the model, or no feature has an attribution above zero.
    """
    settings = ablate_config(config)
    definitions = {items.name: items.definitions()}
    expected = expected_rows(settings, cast(Mapping, definitions), items.name, dictionary.config.n_features)
    tested = BenchmarkAblation(
        items.lm,
        dictionary,
        items.name,
        [],
        settings,
        RowProgress(on_progress, expected),
        items=items,
        batch_tokens=config.batch_tokens,
    )
    if not tested.top():
        raise UserError(no_top_features([items.name]))
    return measure_behaviour(tested, {items.name: []}, repeats=repeats), tested


def measure_group(
    ablation: BenchmarkAblation, group: str, features: Sequence[int], places: Sequence[int], controls: Sequence[str]
) -> EffectsTable:
    """Return the rows of a further set of features, and of controls of its dose on some items.

    Args:
      ablation: the tested dictionary on the benchmark.
      group: the set's name, the group of its edit.
      features: the set, ablated whole on all test items.
      places: of the test items on which it is compared with controls, by their order.
      controls: groups of controls, ``random`` and ``placebo``; they are measured on these items, under the names
        ``control_group`` gives.
    """
    whole = EditDefinition(ablation.behaviour, group, features=tuple(map(int, features)))
    tables = [ablation.table([whole], ablation.norms([whole]))]
    if controls and len(places):
        tables.append(ablation.controls_of(whole, places, controls))
    return merge_tables(tables)


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
