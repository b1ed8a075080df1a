"""Measurements of an ablation for one behaviour: the rows of the effects table.

For each dictionary (the tested one, an untrained one, those of other seeds):

1. T: the k features with the largest attribution for the behaviour's answers on train prompts.
2. Random sets: all features that fire on at least 5 % of the test prompts at an editable position, without T, shuffled
   once and cut into disjoint sets of k.
3. Placebo targets: pairs of tokens that are likely in these contexts (in the top 40 of some train prompt) and are no
   answers. Placebo sets: the k features with the largest attribution for such a pair, on the same train prompts.
4. T is ablated by growing fractions. Every other set is ablated whole and, where its dose exceeds T's, once more by the
   fraction that brings its dose to T's: the change is linear in the fraction, so that is the ratio of the doses.
5. T is ablated on the prompts of the other behaviours and on held-out text.

For the tested dictionary alone: each feature of T, growing sets, on request every live feature alone; and of each
simpler basis as many directions, by the same attribution, as reach T's dose, ablated by the same fractions.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import UserError
from saejax.interventions import activity, bases
from saejax.interventions.activity import FeatureStatistics
from saejax.interventions.answers import FeatureEffect, VerdictConfig, mean_interval
from saejax.interventions.edits import ActivationReplacement, mask
from saejax.interventions.engine import change_norms, run_edits
from saejax.interventions.settings import BASES, AblateConfig
from saejax.interventions.slopes import attribution, leaders, likely_tokens, neutral_tokens, target_attributions
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.interventions.table import (
    BASIS,
    TESTED,
    TEXT,
    UNTRAINED,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
    merge_tables,
)
from saejax.interventions.text import HeldOutText
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.progress import OnProgress, silent
from saejax.statistics.bootstrap import resampling_weights
from saejax.statistics.partition import disjoint_sets
from saejax.tasks.behaviours import Prompt

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KL_FRACTIONS = (0.5, 1.0)  # those at which held-out text is read, which takes longer than the prompts
MIN_FIRING = 0.05  # share of test prompts on which a feature of a random set fires, at least
LIKELY = 40  # a placebo token is among this many most likely ones
TEXT_LENGTH = 32  # tokens of a held-out document
WIDEST = 8  # directions of a basis, in multiples of k, at most


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


def spread_over_templates(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return ``count`` prompts, or all if that is 0: those of each template in turn."""
    turns: collections.Counter[str] = collections.Counter()
    order = []
    for place, prompt in enumerate(prompts):
        order.append((turns[prompt.template], place))
        turns[prompt.template] += 1
    # Each template in turn, as prompts come template by template: the first ones alone would be of a single wording.
    return [prompts[place] for place in sorted(place for _, place in sorted(order)[: count or len(order)])]


@dataclasses.dataclass
class BehaviourAblation:
    """One dictionary, or another basis, on the prompts of one behaviour.

    Raises:
      UserError: there are no train or no test prompts, or the basis does not fit the model.
    """

    lm: LanguageModel  #: the model
    basis: Dictionary  #: the basis whose features or directions are ablated
    behaviour: str  #: its name
    prompts: Sequence[Prompt]  #: prompts of both splits
    config: AblateConfig  #: settings of the ablation
    progress: RowProgress  #: progress of the behaviour
    features: Sequence[int] | None = None  #: T, if it is not chosen by attribution
    _placebos: Sequence[tuple[tuple[str, str] | None, list[int]]] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        train = [prompt for prompt in self.prompts if prompt.split == "train"]
        self.test: list[Any] = [prompt for prompt in self.prompts if prompt.split == "test"]
        if not train or not self.test:
            raise UserError(
                f"behaviour {self.behaviour} has {len(train)} train and {len(self.test)} test prompts: expected some "
                "of each; give both in --task.prompts, or run the stage baseline again"
            )
        config = self.config
        self.split = SplitModel(self.lm, self.basis, config.positions, config.error)
        self.train: list[Any] = spread_over_templates(train, config.attribution_prompts)
        # Counterparts double the clean runs, so they are run where they are needed only.
        self.train_runs, self.runs = (self._run_clean(prompts) for prompts in (self.train, self.test))
        mean_F = activity.statistics(self.split, self.train_runs).mean_F if config.replacement == "mean" else None
        seed = np.uint32(config.seed) if config.replacement == "random" else None
        self.replacement = ActivationReplacement(config.replacement, mean_F=mean_F, seed=seed)
        self.progress.check()
        self.attribution_F = self.mean_attribution(self.train_runs)

    def with_basis(self, basis: Dictionary) -> Self:
        """Return the ablation of another basis on the behaviour."""
        return dataclasses.replace(self, basis=basis, features=None)

    def _run_clean(self, prompts: Sequence[Prompt]) -> list[CleanRun]:
        return self.split.run(prompts, counterparts=self.config.replacement == "counterpart")

    def mean_attribution(self, runs: Sequence[CleanRun]) -> np.ndarray:
        """Return each feature's attribution, mean over the prompts of some clean runs, [F]."""
        attribution_NxF = attribution(self.split, runs, self.replacement)
        self.progress.check()
        # float64, because features of nearly equal attribution are ranked.
        return attribution_NxF.mean(axis=0, dtype=np.float64)

    def top(self) -> list[int]:
        """Return T: at most k features, largest attribution first, those above zero alone; or the named ones."""
        if self.features is not None:
            return list(self.features)
        return leaders(self.attribution_F, self.config.top)

    def run(
        self, edits: Sequence[EditDefinition], prompts: Sequence[Prompt] | None = None, **options: bool
    ) -> dict[str, np.ndarray]:
        """Run edits on the test prompts, or on others; options and what is returned are those of ``run_edits``."""
        runs = self.runs if prompts is None else self._run_clean(prompts)
        on_progress = self.progress.of_call(len(edits) * sum(len(run.index_P) for run in runs))
        return run_edits(self.split, runs, self.edits(edits), self.config.batch_rows, on_progress, **options)

    def measure(self, edits: Sequence[EditDefinition], full: bool = False) -> dict[str, np.ndarray]:
        """Return readouts on the test prompts, [1 + E, P] each: without an edit, then with each edit.

        Args:
          edits: what is run.
          full: whether all readouts are measured, which takes the logits of the whole vocabulary.
        """
        values = self.run(edits, readouts=full)
        if full:
            values["two_way"] = (values["logit_diff"] > 0).astype(np.float64)
        return values

    def table(self, edits: Sequence[EditDefinition], norm_ExP: np.ndarray, full: bool = False) -> EffectsTable:
        """Return the table of the unedited model and of some edits on the test prompts.

        Args:
          edits: E edits.
          norm_ExP: the norms of their changes.
          full: as for ``measure``.
        """
        values = self.measure(edits, full) | dict(change_norm=np.vstack([0 * norm_ExP[:1], norm_ExP]))
        return EffectsTable.block([self.clean, *edits], self.tests, values, self.definitions())

    @property
    def clean(self) -> EditDefinition:
        """The definition of the unedited model."""
        return EditDefinition(self.behaviour, "clean")

    def definitions(self) -> list[PromptDefinition]:
        """Return the definitions of all prompts."""
        return define_prompts(self.behaviour, self.prompts)

    @functools.cached_property
    def tests(self) -> list[PromptDefinition]:
        """The definitions of the test prompts."""
        return [prompt for prompt in self.definitions() if prompt.split == "test"]

    @functools.cached_property
    def statistics(self) -> FeatureStatistics:
        """Firing statistics on the test prompts."""
        return activity.statistics(self.split, self.runs)

    def site_values(self) -> np.ndarray:
        """Return the site's values at editable positions of the train prompts, [N, D]."""
        parts = []
        for run in self.train_runs:
            count = len(run.index_P)
            parts.append(np.asarray(run.value_BxTxD[:count], np.float32)[np.asarray(run.domain_BxT[:count])])
        return np.concatenate(parts)

    def answer_means(self) -> np.ndarray:
        """Return the site's mean last value on the train prompts of each of G correct answers, [G, D]."""
        values: dict[int, list[np.ndarray]] = {}
        for run in self.train_runs:
            for row in range(len(run.index_P)):
                value_D = np.asarray(run.value_BxTxD[row, run.last_B[row]], np.float64)
                values.setdefault(int(run.answers_Bx2[row, 0]), []).append(value_D)
        # By token id, so that the result does not depend on the order of prompts.
        return np.stack([np.mean(rows, axis=0) for _, rows in sorted(values.items())])

    def edits(self, definitions: Sequence[EditDefinition]):
        """Return the batched edits of some definitions."""
        sets, fractions = [edit.features for edit in definitions], [edit.fraction for edit in definitions]
        return mask(self.split.dictionary, sets, fractions, self.replacement)

    def norms(self, definitions: Sequence[EditDefinition]) -> np.ndarray:
        """Return the norm of each edit's change on each test prompt, [E, P]."""
        return change_norms(self.split, self.runs, self.edits(definitions))

    def random_sets(self, top: Sequence[int]) -> np.ndarray:
        """Return disjoint random sets of as many features as T has, none of them in T, [m, k]."""
        # Features that hardly fire change nothing, and would make any set look more important than random ones.
        pool = np.setdiff1d(np.flatnonzero(self.statistics.prompts_F / len(self.test) >= MIN_FIRING), np.asarray(top))
        return disjoint_sets(pool, len(top), self.config.random_sets, self.config.seed)

    def placebo_sets(self) -> Sequence[tuple[tuple[str, str] | None, list[int]]]:
        """Return the placebo targets, as text if they are two tokens, and the top features of each."""
        if self._placebos is None:
            self.choose_placebos(())
        return self._placebos or []

    def choose_placebos(self, ablations: "Sequence[BehaviourAblation]") -> None:
        """Choose the placebo sets of this dictionary, and of those in ``ablations`` of the same site.

        The targets are the same for all, and so are the slopes, which take most of the time.
        """
        # Slopes depend on the site and not on the dictionary.
        sharing = [self, *(each for each in ablations if each.split.point == self.split.point)]
        targets_Rx2 = self.placebo_targets()
        texts = [[self.lm.tokenizer.decode([int(token)]) for token in pair] for pair in targets_Rx2]
        # A swapped activation is one draw of a random one: targets are ranked by what zero ablation would do.
        source = ActivationReplacement() if self.replacement.kind == "counterpart" else self.replacement
        # Mean activations are those of each dictionary's features.
        groups = [[each] for each in sharing] if source.kind == "mean" else [sharing]
        for group in groups if len(targets_Rx2) else ():
            attributions = target_attributions(
                [each.split for each in group],
                [each.train_runs for each in group],
                targets_Rx2,
                group[0].replacement if source.kind == "mean" else source,
                self.progress.of_call(len(targets_Rx2) * len(self.train)),
            )
            for each, attribution_RxF in zip(group, attributions, strict=True):
                sets = [leaders(attribution_F, self.config.top) for attribution_F in attribution_RxF]
                pairs = zip(texts, sets, strict=True)
                each._placebos = [((right, wrong), members) for (right, wrong), members in pairs if members]

    def placebo_targets(self) -> np.ndarray:
        """Return pairs of likely tokens that are the beginning of no answer, [R, 2]; drawn without replacement."""
        likely = likely_tokens(self.split, self.train_runs, LIKELY)
        # Answers of both splits: a placebo that is an answer of a test prompt would be no placebo there.
        answers = {text for prompt in self.prompts for text in (prompt.correct, prompt.wrong)}
        tokens = neutral_tokens(self.lm.tokenizer, likely, answers)
        pairs = len(tokens) * (len(tokens) - 1)
        count = min(self.config.placebo_targets, pairs)
        # Pairs are numbered instead of listed, since all pairs of thousands of likely tokens are millions.
        drawn_R = np.random.default_rng(self.config.seed).choice(pairs, count, replace=False) if count else np.zeros(0)
        first_R, second_R = np.divmod(drawn_R.astype(np.int64), max(len(tokens) - 1, 1))
        second_R = second_R + (second_R >= first_R)  # any token but the first
        return tokens[np.stack([first_R, second_R], axis=1)] if count else np.zeros((0, 2), np.int64)


def measure_behaviour(
    lm: LanguageModel,
    dictionary: Dictionary,
    behaviour: str,
    prompts: Mapping[str, Sequence[Prompt]],
    config: AblateConfig,
    text: HeldOutText | None = None,
    repeats: Mapping[str, Dictionary] | None = None,
    on_progress: OnProgress = silent,
    features: Sequence[int] | None = None,
) -> tuple[EffectsTable, BehaviourAblation]:
    """Measure what the verdict on a behaviour needs.

    Args:
      lm: the model.
      dictionary: the tested one.
      behaviour: its name.
      prompts: prompts of all behaviours of the run, by name.
      config: settings of the ablation.
      text: held-out documents, if there are any.
      repeats: dictionaries of other seeds, by name.
      on_progress: called with rows done and expected; may raise to stop.
      features: T of the tested dictionary, if it is not chosen by attribution.

    Returns:
      The table of the behaviour, and the tested dictionary's ablation for further measurements.

    Raises:
      UserError: prompts are missing, a dictionary does not fit the model, or no feature has an attribution above zero.
    """
    documents = len(text.documents) if text else 0
    progress = RowProgress(
        on_progress, expected_rows(config, prompts, behaviour, dictionary.config.n_features, documents)
    )
    tested = BehaviourAblation(lm, dictionary, behaviour, prompts[behaviour], config, progress, features)
    return measure_all(tested, prompts, text, repeats), tested


def measure_all(
    tested: BehaviourAblation,
    prompts: Mapping[str, Sequence[Prompt]],
    text: HeldOutText | None = None,
    repeats: Mapping[str, Dictionary] | None = None,
) -> EffectsTable:
    """Return the measurements of the tested dictionary, the untrained one, simpler bases and other seeds.

    Args:
      tested: the tested dictionary on the behaviour.
      prompts: prompts of the other behaviours; T is ablated there, too.
      text: held-out documents, if there are any.
      repeats: dictionaries of other seeds, by name.

    Raises:
      UserError: no feature has an attribution above zero, or repeats do not go with the settings.
    """
    config = tested.config
    keeps_error = config.error == "keep"  # otherwise the clean run is that of the tested dictionary alone
    if repeats and not keeps_error:
        raise UserError("with error=drop the clean run is that of one dictionary: test the repeats by themselves")
    baselines = config.baselines if keeps_error else ()
    # Who wants no untrained dictionary wants none as a basis, which the default names.
    baselines = tuple(name for name in baselines if config.untrained or name != "untrained")
    untrained = _on_basis(tested, "untrained") if keeps_error and config.untrained else None
    others = {UNTRAINED: untrained} if untrained else {}
    others |= {name: tested.with_basis(repeat) for name, repeat in (repeats or {}).items()}
    # Before anything is measured, so that the slopes of placebo targets are computed once for all dictionaries.
    tested.choose_placebos(list(others.values()))
    tables, dose = _measure_dictionary(tested, TESTED, prompts, text)
    for name, other in others.items():
        tables += _measure_dictionary(other, name, prompts, text)[0]
    for name in baselines:
        on_basis = untrained if name == "untrained" else _on_basis(tested, name)
        tables += _measure_basis(on_basis, name, dose, text) if on_basis else []
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
      behaviour: its name.
      features: number of features of the dictionary.
      documents: number of held-out documents.
    """
    test = sum(prompt.split == "test" for prompt in prompts[behaviour])
    train = sum(prompt.split == "train" for prompt in prompts[behaviour])
    pool = min(config.random_sets, features // 4 // config.top)  # about a quarter of the features fire
    controls = 1.5 * (pool + config.placebo_targets)  # half of the sets are ablated twice
    trainings = 1 + config.untrained + len(config.repeats)
    edits = trainings * (len(FRACTIONS) + controls) + len(FRACTIONS) * len(config.baselines) + 2 * config.top
    edits += features / 4 * (config.effects == "all")
    on_text = len(KL_FRACTIONS) * (1 + len(config.baselines)) + trainings - 1
    chosen = config.placebo_targets * min(train, config.attribution_prompts or train)  # for all dictionaries at once
    return round(test * (edits + trainings * (len(prompts) - 1))) + chosen + documents * on_text


def _measure_dictionary(
    ablation: BehaviourAblation, name: str, prompts: Mapping[str, Sequence[Prompt]], text: HeldOutText | None
) -> tuple[list[EffectsTable], float]:
    """Measure one dictionary; return its tables and the dose of T."""
    top = ablation.top()
    if not top:
        raise UserError(
            f"no feature of the dictionary has an attribution above zero on the train prompts of {ablation.behaviour}: "
            "does the dictionary belong to this model and site?"
        )

    def define(group: str, members: Sequence[int], index: int = 0, fraction: float = 1.0, target=None):
        features = tuple(int(feature) for feature in members)
        return EditDefinition(ablation.behaviour, group, index, features, fraction, name, target)

    grid = [define("top", top, fraction=fraction) for fraction in FRACTIONS]
    controls = [define("random", members, index) for index, members in enumerate(ablation.random_sets(top))]
    controls += [
        define("placebo", members, index, target=target)
        for index, (target, members) in enumerate(ablation.placebo_sets())
    ]
    extra = []
    if name == TESTED:
        extra += [define("single", [feature], index) for index, feature in enumerate(top)]
        sizes = [2**n for n in range(len(top).bit_length()) if 2**n < len(top)]
        extra += [define("growing", top[:size], index) for index, size in enumerate(sizes)]
    # Norms of whole edits alone: the change is linear in the fraction, and so is its norm.
    whole = [grid[-1], *extra, *controls]
    norm_of = dict(zip(whole, ablation.norms(whole), strict=True))

    def norms(edits: Sequence[EditDefinition]) -> np.ndarray:
        return np.stack([edit.fraction * norm_of[dataclasses.replace(edit, fraction=1.0)] for edit in edits])

    dose = root_mean_square(norm_of[grid[-1]])
    shares = [dose / max(root_mean_square(norm_of[edit]), 1e-30) for edit in controls]
    reduced = [
        dataclasses.replace(edit, fraction=share) for edit, share in zip(controls, shares, strict=True) if share < 1
    ]

    edits = [*grid, *extra]
    tables = [ablation.table(edits, norms(edits), full=True)]
    if controls:
        # Controls without the readouts that take the logits of the whole vocabulary: they are compared on the
        # objective.
        edits = [*controls, *reduced]
        tables.append(ablation.table(edits, norms(edits)))
    behaviours = [item for item in prompts.items() if item[0] != ablation.behaviour]
    # Together, so that few programs are compiled; but random activations are drawn from all prompts of a call.
    for group in [[item] for item in behaviours] if ablation.config.replacement == "random" else [behaviours]:
        tests = [prompt for _, each in group for prompt in each if prompt.split == "test"]
        if tests:
            diff_ExP = ablation.run(grid[-1:], tests)["logit_diff"][1:]
            definitions = [prompt for item in group for prompt in define_prompts(*item) if prompt.split == "test"]
            tables.append(EffectsTable.block(grid[-1:], definitions, dict(logit_diff=diff_ExP)))
    if text:
        tables.append(_measure_text(ablation, grid, KL_FRACTIONS if name == TESTED else KL_FRACTIONS[-1:], text))
    if name == TESTED and ablation.config.effects == "all":
        tables.append(_measure_every(ablation))
    return tables, dose


def _measure_every(ablation: BehaviourAblation) -> EffectsTable:
    """Measure every feature that fires on the test prompts, one by one."""
    # The effect of a feature that never fires is known to be 0.
    live = np.flatnonzero(ablation.statistics.prompts_F > 0)
    every = [EditDefinition(ablation.behaviour, "every", int(i), (int(i),)) for i in live]
    return EffectsTable.block([ablation.clean, *every], ablation.tests, ablation.run(every, snap_rounding=True))


def _measure_basis(ablation: BehaviourAblation, name: str, dose: float, text: HeldOutText | None) -> list[EffectsTable]:
    """Measure the directions of a basis: as many, by attribution, as reach a dose."""
    # Directions are chosen as features are: by attribution on train prompts.
    order = leaders(ablation.attribution_F, WIDEST * ablation.config.top)
    if not order:
        return []

    def define(size: int, fraction: float = 1.0) -> EditDefinition:
        return EditDefinition(ablation.behaviour, BASIS + name, 0, tuple(order[:size]), fraction)

    norm_SxP = ablation.norms([define(size) for size in range(1, len(order) + 1)])
    dose_S = np.array([root_mean_square(norm_P) for norm_P in norm_SxP])
    reaches_S = dose_S >= dose
    size = int(np.argmax(reaches_S)) + 1 if reaches_S.any() else len(order)
    # Down to T's dose exactly, so that the last points of both curves are at one dose.
    most = min(1.0, dose / float(dose_S[size - 1])) if dose_S[size - 1] > 0 else 1.0
    grid = [define(size, fraction * most) for fraction in FRACTIONS]
    tables = [ablation.table(grid, np.stack([edit.fraction * norm_SxP[size - 1] for edit in grid]))]
    return tables + ([_measure_text(ablation, grid, KL_FRACTIONS, text)] if text else [])


def _measure_text(
    ablation: BehaviourAblation, grid: Sequence[EditDefinition], fractions: Sequence[float], text: HeldOutText
) -> EffectsTable:
    """Measure some edits of a grid, and no edit, on held-out text."""
    chosen = [grid[FRACTIONS.index(fraction)] for fraction in fractions]
    values = text.effects(ablation.split, ablation.edits(chosen))
    ablation.progress.of_call(len(chosen) * len(text.documents))(1, 1)
    documents = [PromptDefinition(f"{TEXT}/{number:05d}", TEXT) for number in range(len(text.documents))]
    return EffectsTable.block([EditDefinition(TEXT, "clean"), *chosen], documents, values)


def root_mean_square(norm_P: np.ndarray) -> float:
    """Return the dose of an edit, given the norm of its change on each prompt."""
    return float(np.sqrt(np.mean(np.square(norm_P))))


def _on_basis(tested: BehaviourAblation, name: str) -> BehaviourAblation | None:
    """Return a simpler basis on the behaviour of a dictionary; None where it cannot be had."""
    dictionary, lm = tested.basis, tested.lm
    if name not in BASES:
        return tested.with_basis(load_dictionary(name))
    if name == "untrained":
        # As sparse as the dictionary on these prompts, or it would change more or fewer directions at a time.
        active = round(tested.statistics.fires_F.sum() / max(tested.statistics.positions, 1))
        return tested.with_basis(bases.untrained(dictionary, active, tested.config.seed))
    if name == "neurons":
        if isinstance(lm.config, TorchConfig):  # which has no table of its weights
            return None
        site = Site.parse(dictionary.config.target or dictionary.site)
        # Where a norm follows the MLP, or the site is what it reads, a neuron has no direction at the site's scale. Of
        # several experts each has neurons of its own.
        if lm.config.post_norms or lm.config.n_experts or site.kind == "mlp_in":
            return None
        return tested.with_basis(bases.Neurons(lm, site.layer))
    values_NxD = tested.site_values()
    rows = values_NxD if name == "pca" else tested.answer_means()
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
