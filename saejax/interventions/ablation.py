"""Measurements of an ablation for one behaviour: the rows of the effects table.

For each dictionary (the tested one and dictionaries of other seeds):

1. T: the k features with the largest attribution for the behaviour's answers on train prompts. It is ablated by five
   growing fractions; everything else is measured once, at T's full dose (``saejax.interventions.controls``).
2. Random lists: features that fire on at least 5 % of the test prompts, without T, in random order, to T's dose.
3. Placebo sets: the k features with the largest attribution for a pair of tokens that are likely in these contexts (in
   the top 40 of some train prompt, or further down where these are fewer than 80) and are no answers, scaled to T's
   dose.
4. T on other answers: the logits of each prompt's 20 likeliest tokens that are no answers.
5. T on the prompts of the other behaviours and on held-out text; beside it three random lists and three placebo sets,
   of the text on every eighth document.
6. What is left where the top features alone are kept (``saejax.interventions.sufficiency``).
7. The list by the same attribution to the dose of the tested dictionary's T, for comparison with untrained ones.

For the tested dictionary alone: each feature of T, on request every live feature alone; of each untrained dictionary
and of each simpler basis the list by the same attribution to T's dose, of three untrained ones also with their centre
at zero; what is left where features of three placebo sets and of three untrained dictionaries are kept.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import UserError
from saejax.interventions import bases, sufficiency
from saejax.interventions.activity import FeatureStatistics
from saejax.interventions.answers import FeatureEffect, VerdictConfig, mean_interval
from saejax.interventions.behaviour_prompts import (
    EQUIVALENTS,
    STEPS,
    TOKENS,
    BehaviourPrompts,
    PlaceboSets,
    prompt_placebos,
)
from saejax.interventions.controls import LONGEST, MIN_FIRING, choose_pool, control_edits, list_to_dose
from saejax.interventions.edits import FeatureEdits, mask
from saejax.interventions.references import References
from saejax.interventions.settings import BASES, AblateConfig
from saejax.interventions.several_sites import SeveralSites
from saejax.interventions.slopes import leaders
from saejax.interventions.split_model import SplitModel
from saejax.interventions.table import (
    BASIS,
    KEPT,
    NO_ERROR,
    SPARING,
    TESTED,
    TEXT,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
    merge_tables,
)
from saejax.interventions.text import STEP, HeldOutText
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import INNER_KINDS, Site
from saejax.models.split import Readout
from saejax.progress import OnProgress, silent
from saejax.statistics.bootstrap import resampling_weights
from saejax.tasks.behaviours import Prompt

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of T, for the figure
TEXT_LENGTH = 32  # tokens of a held-out document


class RowProgress:
    """Progress of a behaviour, whose edits are run in several calls, in rows.

    A row is an edit on a prompt or on a document, or a placebo target on a train prompt.

    Args:
      on_progress: called with the rows done and expected; may raise to stop.
      rows: expected rows.
    """

    def __init__(self, on_progress: OnProgress = silent, rows: int = 0):
        self._on_progress, self._rows, self._done = on_progress, rows, 0

    def check(self) -> None:
        """Report where the behaviour is, which may raise to stop."""
        self._on_progress(self._done, max(self._done, self._rows))

    def of_call(self, rows: int) -> OnProgress:
        """Return the progress function of the next call, which runs ``rows`` rows."""
        before, self._done = self._done, self._done + rows
        total_rows = max(self._done, self._rows)
        return lambda done, total: self._on_progress(before + (done * rows // total if total else 0), total_rows)


def define_prompts(behaviour: str, prompts: Sequence[Prompt]) -> list[PromptDefinition]:
    """Return the definitions of a behaviour's prompts, train prompts included."""
    trained = {prompt.template for prompt in prompts if prompt.split == "train"}
    return [
        PromptDefinition(
            id=f"{behaviour}/{number:05d}",
            behaviour=behaviour,
            template=prompt.template,
            held_out=prompt.template not in trained,
            split=prompt.split,
            text=prompt.text,
            correct=prompt.correct,
            wrong=prompt.wrong,
        )
        for number, prompt in enumerate(prompts)
    ]


def check_prompts(prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Check that every behaviour has prompts that choose features and prompts that judge them.

    Raises:
      UserError: one has no train prompt, fewer than 2 test prompts, or the name of held-out text.
    """
    if TEXT in prompts:
        raise UserError(f"a behaviour is called {TEXT!r}, as held-out text is in the table of effects: rename it")
    for name, some in prompts.items():
        train, test = (sum(prompt.split == split for prompt in some) for split in ("train", "test"))
        if not train or test < 2:
            raise UserError(
                f"behaviour {name} has {train} train and {test} test prompts: expected at least 1 and 2; give both in "
                "--task.prompts, raise --task.test_prompts, or run the stage baseline again"
            )


def spread_over_templates(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return ``count`` prompts, or all if that is 0, from each template in turn."""
    turns: collections.Counter[str] = collections.Counter()
    order = []
    for place, prompt in enumerate(prompts):
        order.append((turns[prompt.template], place))
        turns[prompt.template] += 1
    # Each template in turn, as prompts come template by template: the first ones alone would be of a single wording.
    return [prompts[place] for place in sorted(place for _, place in sorted(order)[: count or len(order)])]


#: What edits are measured on.
Texts = TypeVar("Texts", BehaviourPrompts, References)


@dataclasses.dataclass
class BehaviourAblation(Generic[Texts]):
    """One dictionary, or another basis, on the prompts of a behaviour or the items of a benchmark."""

    basis: Dictionary  #: the basis whose features or directions are ablated
    behaviour: str  #: its name, or the benchmark's
    config: AblateConfig  #: settings of the ablation
    progress: RowProgress  #: progress of the behaviour
    definitions: Sequence[PromptDefinition]  #: definitions of all prompts or items
    train: Texts  #: what chooses features
    test: Texts  #: what judges them
    features: Sequence[int] | None = None  #: T, if it is not chosen by attribution
    placebos: PlaceboSets = dataclasses.field(default_factory=list)  #: its placebo sets, once they are chosen

    def __post_init__(self):
        self.attribution_F = self.train.attribution_F
        self.progress.check()

    def with_basis(self, basis: Dictionary) -> "BehaviourAblation[Texts]":
        """Return the ablation of another basis, with the clean runs and slopes of this one where they fit."""
        split = self.train.split.with_dictionary(basis)
        train = self.train.with_split(split)
        test = self.test.with_split(split, train)
        return dataclasses.replace(self, basis=basis, features=None, placebos=[], train=train, test=test)

    @property
    def split(self) -> SplitModel:
        """The model, split at the basis's site."""
        return self.test.split

    def top(self) -> list[int]:
        """Return T: at most k features, largest attribution first, those above zero alone; or the named ones."""
        if self.features is not None:
            return list(map(int, self.features))
        return leaders(self.attribution_F, self.config.top)

    def run(self, edits: Sequence[EditDefinition], **options: bool) -> dict[str, np.ndarray]:
        """Run edits on the test prompts; options and result are as for ``BehaviourPrompts.measure``."""
        on_progress = self.progress.of_call(len(edits) * len(self.test))
        return self.test.measure(self.edits(edits), on_progress, **options)

    def table(self, edits: Sequence[EditDefinition], norm_ExP: np.ndarray, full: bool = False) -> EffectsTable:
        """Return the table of the unedited model and of some edits on the test prompts.

        Args:
          edits: E edits.
          norm_ExP: the norms of their changes.
          full: as for ``BehaviourPrompts.measure``.
        """
        values = self.run(edits, full=full) | dict(change_norm=np.pad(norm_ExP, ((1, 0), (0, 0))))
        return EffectsTable.block([self.clean, *edits], self.tests, values, self.definitions)

    @property
    def clean(self) -> EditDefinition:
        """The definition of the unedited model."""
        return EditDefinition(self.behaviour, "clean")

    @property
    def tests(self) -> list[PromptDefinition]:
        """The definitions of the test prompts."""
        return [prompt for prompt in self.definitions if prompt.split == "test"]

    @functools.cached_property
    def statistics(self) -> FeatureStatistics:
        """Firing statistics on the test prompts."""
        return self.test.statistics()

    def edits(self, definitions: Sequence[EditDefinition]) -> FeatureEdits:
        """Return the batched edits of some definitions."""
        sets, fractions = [edit.features for edit in definitions], [edit.fraction for edit in definitions]
        return mask(self.split.dictionary, sets, fractions, self.test.replacement)

    def norms(self, definitions: Sequence[EditDefinition]) -> np.ndarray:
        """Return the norm of each edit's change on each test prompt, [E, P]."""
        return self.test.change_norms(self.edits(definitions))


def measure_behaviour(
    ablations: Mapping[str, BehaviourAblation[Texts]],
    prompts: Mapping[str, Sequence[Prompt]] | None = None,
    text: HeldOutText | None = None,
) -> EffectsTable:
    """Return what the verdict needs: measurements of the tested dictionary, untrained ones, simpler bases, other seeds.

    Args:
      ablations: dictionaries on a behaviour, or on a benchmark, with their placebo sets: the tested one as ``TESTED``,
        which can be used again, and others by name.
      prompts: prompts of the other behaviours; T is ablated there, too.
      text: held-out documents, if there are any.

    Returns:
      The table. Where T is empty it holds the unedited model alone.
    """
    tested, prompts = ablations[TESTED], prompts or {}
    config = tested.config
    keeps_error = config.error == "keep"  # otherwise the clean run belongs to the tested dictionary alone
    if not tested.top():  # question 5 of other behaviours looks at this one, too
        return tested.table([], np.zeros((0, len(tested.test))), full=True)
    tables, dose = _measure_dictionary(tested, TESTED, prompts, text)
    # One without a feature that could lower the answer has no answers on this behaviour, which the verdict says.
    others = {name: other for name, other in ablations.items() if name != TESTED and other.top()}
    for name, other in others.items():
        tables += _measure_dictionary(other, name, prompts, text)[0]
    for name, ablation in {TESTED: tested, **others}.items():
        tables += _measure_kept(ablation, "top", [_by_attribution(ablation)], dictionary=name)
    tables += _measure_kept(tested, "placebo", [members for _, members in tested.placebos if members])
    if keeps_error and config.untrained_dictionaries:
        tables += _measure_untrained(tested, dose)
        for name, other in others.items():
            # At another site a dose is another change: there the tested one's untrained dictionaries are no controls.
            if other.split.point == tested.split.point:
                tables += _measure_list(other, "trained", 0, dose, dictionary=name)
    for name in config.baselines if keeps_error else ():
        on_basis = _on_basis(tested, name)
        if on_basis:
            tables += _measure_list(on_basis, BASIS + name, 0, dose)
    return merge_tables(tables)


def expected_rows(
    config: AblateConfig,
    prompts: Mapping[str, Sequence[Prompt]],
    behaviour: str,
    features: int,
    documents: int = 0,
) -> int:
    """Return about how many rows, as ``RowProgress`` has them, a behaviour takes.

    Args:
      config: settings of the ablation.
      prompts: prompts of all behaviours, by name.
      behaviour: name of the behaviour.
      features: number of features of the dictionary.
      documents: number of held-out documents.
    """
    test = sum(prompt.split == "test" for prompt in prompts[behaviour])
    train = sum(prompt.split == "train" for prompt in prompts[behaviour])
    trainings = 1 + len(config.repeats)
    keeps_error = config.error == "keep"  # otherwise there are neither untrained dictionaries nor simpler bases
    untrained, baselines = config.untrained_dictionaries * keeps_error, len(config.baselines) * keeps_error
    edits = trainings * (len(FRACTIONS) + config.random_sets + config.placebo_targets + bool(untrained))
    edits += config.top + baselines + untrained + min(sufficiency.CONTROLS, untrained)  # these around zero, too
    edits += features // 4 * (config.effects == "all")  # about a quarter of the features fire
    kept = trainings + sufficiency.CONTROLS * bool(config.placebo_targets) + min(sufficiency.CONTROLS, untrained)
    edits += 2 * len(sufficiency.SIZES) * kept
    others = sum(prompt.split == "test" for name in prompts if name != behaviour for prompt in prompts[name])
    # A token less than there are: each is compared with the first.
    targets = max(TOKENS, config.placebo_targets) - 1 if config.placebo_targets else 0
    chosen = targets * min(train, config.attribution_prompts or train)  # for all dictionaries at once
    if config.attribution == "integrated":
        chosen *= STEPS
    if config.attribution == "integrated" or config.replacement == "mean":  # which are each dictionary's own
        chosen *= trainings
    # T, and controls beside it.
    controls = min(sufficiency.CONTROLS, config.random_sets) + min(sufficiency.CONTROLS, config.placebo_targets)
    elsewhere = others * (1 + controls) + documents + -(-documents // STEP) * controls
    return test * edits + chosen + elsewhere * trainings


def begin_ablation(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    behaviour: str,
    prompts: Mapping[str, Sequence[Prompt]],
    config: AblateConfig,
    on_progress: OnProgress = silent,
    documents: int = 0,
    *,
    features: Sequence[int] | None = None,
    **readouts: Readout | None,
) -> dict[str, BehaviourAblation[BehaviourPrompts]]:
    """Return the ablations of dictionaries on one behaviour, by name, with their placebo sets.

    Args:
      lm: the model.
      dictionaries: the tested one as ``TESTED``, then those of other seeds by name.
      behaviour: name of the behaviour.
      prompts: prompts of all behaviours, by name.
      config: settings of the ablation.
      on_progress: called with the rows done and expected; may raise to stop.
      documents: number of held-out documents.
      features: T, if it is not chosen by attribution.
      **readouts: ``readout``, measured in place of the logit difference, and ``placebo_readout``; see
        ``BehaviourPrompts``.

    Raises:
      UserError: a dictionary does not fit the model, a prompt does not fit the readout, or there are dictionaries of
        other seeds with error=drop.
    """
    basis, *repeats = dictionaries.values()
    if repeats and config.error == "drop":
        raise UserError("with error=drop the clean run is that of one dictionary: test the repeats by themselves")
    rows = expected_rows(config, prompts, behaviour, basis.config.n_features, documents)
    split = SplitModel(lm, basis, config.positions, config.error, readouts.get("readout"))
    every, definitions = prompts[behaviour], define_prompts(behaviour, prompts[behaviour])
    equivalents = EQUIVALENTS.get(behaviour, ())
    chosen = spread_over_templates([prompt for prompt in every if prompt.split == "train"], config.attribution_prompts)
    if placebo := readouts.get("placebo_readout"):
        split.with_readout(placebo).tokenize(chosen)  # of a prompt without the token that it reads, all slopes are 0
    tests = [prompt for prompt in every if prompt.split == "test"]
    train = BehaviourPrompts(
        split,
        chosen,
        config,
        answers=frozenset(text for prompt in every for text in (prompt.correct, prompt.wrong)).union(equivalents),
        length=split.common_length([*chosen, *tests]),
        placebo_readout=placebo,
    )
    progress, test = RowProgress(on_progress, rows), dataclasses.replace(train, prompts=tests, train=train)
    tested = BehaviourAblation(basis, behaviour, config, progress, definitions, train, test, features)
    if not tested.top():
        return {TESTED: tested}
    ablations = {
        name: tested.with_basis(dictionary) if name != TESTED else tested for name, dictionary in dictionaries.items()
    }
    # Together, so that the slopes of placebo targets are computed once for all dictionaries.
    sets_of = prompt_placebos([ablation.train for ablation in ablations.values()], progress.of_call)
    for ablation, sets in zip(ablations.values(), sets_of, strict=True):
        ablation.placebos = sets
    return ablations


def _measure_dictionary(
    ablation: BehaviourAblation, name: str, prompts: Mapping[str, Sequence[Prompt]], text: HeldOutText | None
) -> tuple[list[EffectsTable], float]:
    """Measure one dictionary; return its tables and the dose of T."""
    top, config, test = ablation.top(), ablation.config, ablation.test
    whole = EditDefinition(ablation.behaviour, "top", features=tuple(top), dictionary=name)
    grid = [dataclasses.replace(whole, fraction=fraction) for fraction in FRACTIONS]
    singles = [
        dataclasses.replace(whole, group="single", index=index, features=(feature,))
        for index, feature in enumerate(top if name == TESTED else [])
    ]
    norm_ExP = ablation.norms([grid[-1], *singles])
    dose = root_mean_square(norm_ExP[0])
    # The change is linear in the fraction, and so is its norm.
    norms = np.concatenate([np.outer(FRACTIONS, norm_ExP[0]), norm_ExP[1:]])
    tables, controls = [ablation.table([*grid, *singles], norms, full=True)], list[EditDefinition]()
    if dose > 0:
        counts = config.random_sets, config.placebo_targets
        of_controls = measure_controls(ablation, top, ablation.placebos, dose, counts, name)
        tables += of_controls
        controls = first_controls(of_controls)
    if isinstance(test, BehaviourPrompts):  # answers of several tokens have no ranks beside them
        if ranks := test.ranks(ablation.edits(grid[-1:])):
            tables.append(EffectsTable.block([ablation.clean, grid[-1]], ablation.tests, ranks))
        behaviours = [item for item in prompts.items() if item[0] != ablation.behaviour]
        # Together, so that few programs are compiled; but random activations are drawn from all prompts of a call.
        for group in [[item] for item in behaviours] if config.replacement == "random" else [behaviours]:
            tests = [prompt for _, prompts_of in group for prompt in prompts_of if prompt.split == "test"]
            if tests:
                definitions = [prompt for item in group for prompt in define_prompts(*item) if prompt.split == "test"]
                others = dataclasses.replace(test, prompts=tests)
                for edits in filter(None, (grid[-1:], controls)):
                    on_progress = ablation.progress.of_call(len(edits) * len(tests))
                    values = others.measure(ablation.edits(edits), on_progress)
                    edited = {name: value_ExP[1:] for name, value_ExP in values.items()}
                    tables.append(EffectsTable.block(edits, definitions, edited))
    if text:
        documents = [PromptDefinition(f"{TEXT}/{number:05d}", TEXT) for number in range(len(text.documents))]
        for edits, some, step in ((grid[-1:], text, 1), (controls, text.few, STEP)):
            if edits:
                ce = some.effects(ablation.split, ablation.edits(edits))
                ablation.progress.of_call(len(edits) * len(some.documents))(1, 1)
                clean = EditDefinition(TEXT, "clean")
                tables.append(EffectsTable.block([clean, *edits], documents[::step], dict(ce=ce)))
    if name == TESTED and config.effects == "all":
        # The effect of a feature that never fires is known to be 0, unless something takes its place: its mean over
        # train prompts, or a counterpart's activation. Such features are not ranked, as the documents say: they may be
        # most of a wide dictionary, and what is asked is which of the features that are there matter.
        live = np.flatnonzero(ablation.statistics.prompts_F > 0)
        every = [EditDefinition(ablation.behaviour, "every", int(i), (int(i),)) for i in live]
        values = ablation.run(every, snap_rounding=True)
        tables.append(EffectsTable.block([ablation.clean, *every], ablation.tests, values))
    return tables, dose


def first_controls(tables: Sequence[EffectsTable]) -> list[EditDefinition]:
    """Return the first random lists and placebo sets of some tables, which other behaviours and text are run with."""
    edits = [edit for table in tables for edit in table.edits]
    of_groups = ([edit for edit in edits if edit.group == group] for group in SPARING)
    return [edit for some in of_groups for edit in some[: sufficiency.CONTROLS]]


def measure_controls(
    ablation: BehaviourAblation,
    top: Sequence[int],
    placebos: PlaceboSets,
    dose: float,
    counts: tuple[int, int],
    dictionary: str = TESTED,
    ending: str = "",
) -> list[EffectsTable]:
    """Measure the random lists and the placebo sets of a dose.

    Args:
      ablation: the ablation of the dictionary whose features they are.
      top: features that no random list holds.
      placebos: placebo sets, of which the first k features are taken.
      dose: the dose, above 0.
      counts: random lists and placebo sets, at most.
      dictionary: what the dictionary is called in the table.
      ending: follows the names of the groups.
    """
    test, config = ablation.test, ablation.config

    def define(group: str, members: Sequence[int], index: int, fraction: float, target: Any) -> EditDefinition:
        features = tuple(map(int, members))
        return EditDefinition(ablation.behaviour, group + ending, index, features, fraction, dictionary, target)

    pool = choose_pool(ablation.statistics.prompts_F, len(test), top, MIN_FIRING, config.seed)
    sets = [(target, members[: config.top]) for target, members in placebos]
    not_run, *edits = control_edits(define, test.changes, pool, sets, dose, counts, config.seed)
    tables = [EffectsTable((not_run,), (), *np.zeros((4, 0), np.int64))]
    # Without the readouts that take the logits of the whole vocabulary: they are compared on the objective.
    return [*tables, ablation.table(edits, ablation.norms(edits))] if edits else tables


def _measure_untrained(tested: BehaviourAblation, dose: float) -> list[EffectsTable]:
    """Measure the tested dictionary and untrained ones, one at a time, by the same function."""
    config, statistics = tested.config, tested.statistics
    # As sparse as the dictionary on these prompts, or they would change more or fewer directions at a time.
    active = round(statistics.fires_F.sum() / max(statistics.positions, 1))
    tables, like = _measure_list(tested.with_basis(tested.basis), "trained", 0, dose), tested
    for index in range(config.untrained_dictionaries):
        basis = (
            tested.basis.untrained(statistics.fires_F, statistics.positions, config.seed + index)
            if isinstance(tested.basis, SeveralSites)
            else bases.untrained(tested.basis, active, config.seed + index)
        )
        untrained = like.with_basis(basis)
        # Of a transcoder they read another site: its runs and slopes are shared among them.
        like = like if untrained.split.point == like.split.point else untrained
        site = basis.site if basis.site != tested.basis.site else ""
        tables += _measure_list(untrained, "untrained", index, dose, site)
        if index < sufficiency.CONTROLS and (order := _by_attribution(untrained)):
            tables += _measure_kept(untrained, "untrained", [order], index)
        if index < sufficiency.CONTROLS and not isinstance(basis, SeveralSites):
            around_zero = untrained.with_basis(bases.around_zero(basis))
            tables += _measure_list(around_zero, "uncentred", index, dose, site)
    return tables


def _by_attribution(ablation: BehaviourAblation) -> list[int]:
    """Return the top features of a dictionary and the next ones, as many as question 6 keeps."""
    longest, top = ablation.config.top * sufficiency.SIZES[-1], ablation.top()
    return [*top, *(feature for feature in leaders(ablation.attribution_F, longest) if feature not in top)][:longest]


def _measure_kept(
    ablation: BehaviourAblation,
    group: str,
    orders: Sequence[Sequence[int]],
    first: int = 0,
    dictionary: str = TESTED,
) -> list[EffectsTable]:
    """Measure what is left where the beginnings of some lists alone are kept, with and without the error term.

    Args:
      ablation: the ablation of the lists' dictionary.
      group: what the lists are of: top, placebo or untrained.
      orders: features of each list; ``sufficiency.CONTROLS`` of them are used.
      first: number of the first list in the group.
      dictionary: what the dictionary is called in the table.
    """
    sizes = [ablation.config.top * times for times in sufficiency.SIZES]
    sets: dict[tuple[int, int], tuple[int, ...]] = {}  # a short list has fewer sizes
    for number, order in enumerate(orders[: sufficiency.CONTROLS], first):
        for step, size in enumerate(sizes):
            if len(order) >= size or not step:
                sets[number, step] = tuple(order[:size])
    train, test = ablation.train, ablation.test
    # Answers of several tokens are not asked; what a site of features alone holds is not what edits of several leave.
    is_asked = isinstance(train, BehaviourPrompts) and not isinstance(ablation.basis, SeveralSites)
    if not sets or not is_asked or not isinstance(test, BehaviourPrompts):
        return []
    mean_F = train.statistics().mean_F.astype(np.float32)
    values_2xExP = sufficiency.keep_features(ablation.split, test.runs, mean_F, list(sets.values()))
    ablation.progress.of_call(2 * len(sets) * len(ablation.test))(1, 1)
    # Where the clean run has no error term there is none to drop.
    endings = ("", NO_ERROR) if ablation.config.error == "keep" else ("",)
    return [
        EffectsTable.block(
            [
                EditDefinition(
                    ablation.behaviour,
                    f"{KEPT}{group}{ending}",
                    number * len(sizes) + step,
                    members,
                    dictionary=dictionary,
                )
                for (number, step), members in sets.items()
            ],
            ablation.tests,
            {ablation.split.objective: values_ExP},
        )
        for ending, values_ExP in zip(endings, values_2xExP, strict=False)
    ]


def _measure_list(
    ablation: BehaviourAblation, group: str, index: int, dose: float, site: str = "", dictionary: str = TESTED
) -> list[EffectsTable]:
    """Measure the list of a basis to a dose: its directions in the order of their attribution on train prompts."""
    order = leaders(ablation.attribution_F, LONGEST)
    if not order or not dose:
        return []
    members, fraction = list_to_dose(ablation.test.changes, order, dose)
    edit = EditDefinition(ablation.behaviour, group, index, members, fraction, dictionary, site=site)
    return [ablation.table([edit], ablation.norms([edit]))]


def root_mean_square(norm_P: np.ndarray) -> float:
    """Return the dose of an edit, given the norm of its change on each prompt."""
    return float(np.sqrt(np.mean(np.square(norm_P))))


def _on_basis(tested: BehaviourAblation, name: str) -> BehaviourAblation | None:
    """Return a simpler basis on the behaviour of a dictionary; None where it cannot be had."""
    dictionary, lm = tested.basis, tested.split.lm
    if isinstance(dictionary, SeveralSites):  # there is no such basis of several sites
        return None
    if name not in BASES:
        return tested.with_basis(load_dictionary(name, mesh=lm.mesh))
    if name == "neurons":
        if isinstance(lm.config, TorchConfig):  # which has no table of its weights
            return None
        site = Site.parse(dictionary.config.target or dictionary.site)
        # Where a norm follows the MLP, or the site is within attention or the MLP or read by it, a neuron has no
        # direction at the site's scale. Of several experts each has neurons of its own.
        if lm.config.post_norms or lm.config.n_experts or site.kind in (*INNER_KINDS, "mlp_in"):
            return None
        return tested.with_basis(bases.Neurons(lm, site.layer))
    values_NxD = tested.train.site_values()
    rows = values_NxD
    if name != "pca":
        if isinstance(tested.train, References):  # nearly every item has an answer of its own
            return None
        rows = tested.train.answer_means()
    # Of a single answer there is no difference of means.
    if not len(values_NxD) or len(rows) < 2:
        return None
    directions = bases.principal_directions(dictionary, rows, values_NxD)
    return tested.with_basis(directions) if directions is not None else None


def describe_top(table: EffectsTable, ablation: BehaviourAblation) -> tuple[FeatureEffect, ...]:
    """Return what each top feature does alone, from a table's group ``single``."""
    prompts = table.select_prompts(ablation.behaviour)
    edits = table.select_edits(ablation.behaviour, "single", TESTED)
    drop_KxP = table.drops(edits, prompts, table.objective(ablation.behaviour))
    templates = [prompt.template for prompt in prompts]
    config = ablation.config
    weights_SxP = resampling_weights(templates, config.bootstrap, config.seed)
    intervals = [mean_interval(drop_P, weights_SxP) for drop_P in drop_KxP]
    statistics = ablation.statistics
    return tuple(
        FeatureEffect(
            feature=(feature := edit.features[0]),
            attribution=float(ablation.attribution_F[feature]),
            drop=interval,
            firing_rate=float(statistics.firing_rate_F[feature]),
            mean_activation=float(statistics.mean_activation_F[feature]),
        )
        for edit, interval in zip(edits, intervals, strict=True)
    )


def verdict_config(config: AblateConfig) -> VerdictConfig:
    """Return the numbers of the rule."""
    return VerdictConfig(min_accuracy_drop=config.min_accuracy_drop, resamples=config.bootstrap, seed=config.seed)
