"""Measurements of an ablation for one behaviour: the rows of the effects table.

For each dictionary (the tested one and dictionaries of other seeds):

1. T: the k features with the largest attribution for the behaviour's answers on train prompts. It is ablated by five
   growing fractions; everything else is measured once, at T's full dose (``saejax.interventions.controls``).
2. Random lists: features that fire on at least 5 % of the test prompts, without T, in random order, to T's dose.
3. Placebo sets: the k features with the largest attribution for a pair of tokens that are likely in these contexts (in
   the top 40 of some train prompt, or further down where these are fewer than 80) and are no answers, scaled to T's
   dose.
4. T on other answers: the logits of each prompt's 20 likeliest tokens that are no answers.
5. T on the prompts of the other behaviours and on held-out text.

6. What is left where the top features alone are kept (``saejax.interventions.sufficiency``).
7. The list by the same attribution to the dose of the tested dictionary's T, for comparison with untrained ones.

For the tested dictionary alone: each feature of T, on request every live feature alone; of each untrained dictionary
and of each simpler basis the list by the same attribution to T's dose; what is left where features of three placebo
sets and of three untrained dictionaries are kept.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import UserError
from saejax.interventions import activity, bases, sufficiency
from saejax.interventions.activity import FeatureStatistics
from saejax.interventions.answers import FeatureEffect, VerdictConfig, mean_interval
from saejax.interventions.controls import (
    LONGEST,
    MIN_FIRING,
    Changes,
    choose_pool,
    control_edits,
    list_to_dose,
    token_pairs,
)
from saejax.interventions.edits import ActivationReplacement, mask
from saejax.interventions.engine import change_norms, measure_changes, rank_logits, run_edits
from saejax.interventions.settings import BASES, AblateConfig
from saejax.interventions.several_sites import SeveralSites
from saejax.interventions.slopes import (
    answer_slopes,
    attribution,
    leaders,
    likely_tokens,
    neutral_tokens,
    target_attributions,
)
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.interventions.table import (
    BASIS,
    KEPT,
    NO_ERROR,
    RANKS,
    TESTED,
    TEXT,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
    merge_tables,
)
from saejax.interventions.text import HeldOutText
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.split import Readout
from saejax.progress import OnProgress, silent
from saejax.statistics.bootstrap import resampling_weights
from saejax.tasks.behaviours import Prompt

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of T, for the figure
LIKELY = 40  # a placebo token is among this many most likely ones
TOKENS = 80  # placebo tokens, at least: each is in at most four pairs
STEPS = 10  # of the path of integrated attribution: Marks et al. use as many
RANKED = 400  # likeliest tokens of each prompt among which other answers are looked for
TEXT_LENGTH = 32  # tokens of a held-out document
#: Further right answers of a behaviour, as text: they are no other questions to which T should be indifferent.
EQUIVALENTS: Mapping[str, tuple[str, ...]] = dict(
    agreement=(" was", " were", " has", " have", " does", " do", "'s", "'re", " isn", " aren", " wasn", " weren")
)


class PlaceboTargets(NamedTuple):
    """R placebo targets, as sums of S targets whose attribution is measured."""

    ids_Sx2: np.ndarray  #: two tokens, whose logits are subtracted, or in the first column the number of a readout
    weight_RxS: np.ndarray  #: attribution is linear in the target: the weight of each in the sum
    names: Sequence[tuple[str, str] | None]  #: of the R targets, two tokens as text; None of a readout


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
      UserError: one has no train prompt, or fewer than 2 test prompts.
    """
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


@dataclasses.dataclass
class BehaviourAblation:
    """One dictionary, or another basis, on the prompts of one behaviour.

    Raises:
      UserError: the basis does not fit the model.
    """

    lm: LanguageModel  #: the model
    basis: Dictionary  #: the basis whose features or directions are ablated
    behaviour: str  #: its name
    prompts: Sequence[Prompt]  #: prompts of both splits; see ``check_prompts``
    config: AblateConfig  #: settings of the ablation
    progress: RowProgress  #: progress of the behaviour
    features: Sequence[int] | None = None  #: T, if it is not chosen by attribution
    like: "BehaviourAblation | None" = None  #: an ablation whose clean runs and slopes are used again where they fit
    readout: Readout | None = None  #: what is measured; None: the logit difference
    placebo_readout: Readout | None = None  #: readouts of whose top features placebo sets are made; None: of tokens
    _placebos: Sequence[tuple[tuple[str, str] | None, list[int]]] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        train = [prompt for prompt in self.prompts if prompt.split == "train"]
        self.test: list[Any] = [prompt for prompt in self.prompts if prompt.split == "test"]
        config = self.config
        self.split = SplitModel(self.lm, self.basis, config.positions, config.error, self.readout)
        self.train: list[Any] = spread_over_templates(train, config.attribution_prompts)
        shared = self.like if self.like and self.split.reads_like(self.like.split) else None
        # One length for both splits, so that they share programs.
        self._length: int = shared._length if shared else self.split.common_length([*self.train, *self.test])
        # Counterparts double the clean runs, so they are run where they are needed only.
        self.train_runs: list[CleanRun] = shared.train_runs if shared else self._run_clean(self.train)
        self.runs: list[CleanRun] = shared.runs if shared else self._run_clean(self.test)
        mean_F = activity.statistics(self.split, self.train_runs).mean_F if config.replacement == "mean" else None
        seed = np.uint32(config.seed) if config.replacement == "random" else None
        self.replacement = ActivationReplacement(config.replacement, mean_F=mean_F, seed=seed)
        self.progress.check()
        # Slopes along the path of one dictionary are not another's.
        self.slopes: Any = shared.slopes if shared and not self.steps else self.answer_slopes()
        self.attribution_F = self.mean_attribution(self.train_runs, self.slopes)
        self.like = None

    def with_basis(self, basis: Dictionary, like: "BehaviourAblation | None" = None) -> Self:
        """Return the ablation of another basis on the behaviour, with the clean runs and slopes of ``like``."""
        return dataclasses.replace(self, basis=basis, features=None, like=like)

    @property
    def steps(self) -> int:
        """The points over which slopes are averaged; 0: the slope without an edit."""
        return STEPS if self.config.attribution == "integrated" else 0

    def answer_slopes(self) -> Any:
        """Return slopes of the answers on the train prompts, which dictionaries of the site share."""
        return answer_slopes(self.split, self.train_runs, self.replacement, self.steps)

    def changes(self, features: Sequence[int] | np.ndarray) -> Changes:
        """Return the changes that ablating some features makes on the test prompts."""
        return measure_changes(self.split, self.runs, self.replacement, features)

    def _run_clean(self, prompts: Sequence[Prompt]) -> list[CleanRun]:
        return self.split.run(prompts, self.config.replacement == "counterpart", self._length)

    def mean_attribution(self, runs: Sequence[CleanRun], slopes: Any = None) -> np.ndarray:
        """Return each feature's attribution, mean over the prompts of some clean runs, [F], given slopes there."""
        attribution_F = attribution(self.split, runs, self.replacement, self.steps, slopes)
        self.progress.check()
        return attribution_F

    def top(self) -> list[int]:
        """Return T: at most k features, largest attribution first, those above zero alone; or the named ones."""
        if self.features is not None:
            return list(self.features)
        return leaders(self.attribution_F, self.config.top)

    def run(
        self, edits: Sequence[EditDefinition], prompts: Sequence[Prompt] | None = None, **options: bool
    ) -> dict[str, np.ndarray]:
        """Run edits on the test prompts, or on others; options and result are as for ``run_edits``."""
        runs = self.runs if prompts is None else self._run_clean(prompts)
        on_progress = self.progress.of_call(len(edits) * sum(len(run.index_P) for run in runs))
        return run_edits(self.split, runs, self.edits(edits), self.config.batch_rows, on_progress, **options)

    def measure(self, edits: Sequence[EditDefinition], full: bool = False) -> dict[str, np.ndarray]:
        """Return readouts on the test prompts, [1 + E, P] each: without an edit, then with each edit.

        Args:
          edits: what is run.
          full: whether all readouts are measured, which takes the logits of the whole vocabulary; of a user's readout
            there are no others.
        """
        full = full and not self.readout
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
        values = self.measure(edits, full) | dict(change_norm=np.pad(norm_ExP, ((1, 0), (0, 0))))
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

    def pool(self, top: Sequence[int]) -> np.ndarray:
        """Return the features of which random lists are made."""
        return choose_pool(self.statistics.prompts_F, len(self.test), top, MIN_FIRING, self.config.seed)

    def placebo_sets(self) -> Sequence[tuple[tuple[str, str] | None, list[int]]]:
        """Return the placebo targets, as text if they are two tokens, and the top features of each."""
        return [(target, members[: self.config.top]) for target, members in self.placebo_orders()]

    def placebo_orders(self) -> Sequence[tuple[tuple[str, str] | None, list[int]]]:
        """Return the placebo targets with as many features of each as question 6 keeps, by falling attribution."""
        if self._placebos is None:
            self.choose_placebos(())
        return self._placebos or []

    def choose_placebos(self, ablations: "Sequence[BehaviourAblation]") -> None:
        """Choose the placebo sets of this dictionary, and of those in ``ablations`` of the same site.

        The targets are the same for all, and so are the slopes, which take most of the time.
        """
        # Slopes depend on the site and not on the dictionary.
        sharing = [self, *(each for each in ablations if each.split.point == self.split.point)]
        targets = self._readout_targets() if self.readout else self._token_targets()
        if not targets:
            return
        # A swapped activation is one draw of a random one: targets are ranked by what zero ablation would do.
        source = ActivationReplacement() if self.replacement.kind == "counterpart" else self.replacement
        # Mean activations belong to each dictionary's features, and so does the path.
        groups = [[each] for each in sharing] if source.kind == "mean" or self.steps else [sharing]
        for group in groups:
            splits = [each.split for each in group]
            if self.placebo_readout:
                splits = [split.with_readout(self.placebo_readout) for split in splits]
            attributions = target_attributions(
                splits,
                [each.train_runs for each in group],
                targets.ids_Sx2,
                group[0].replacement if source.kind == "mean" else source,
                self.progress.of_call(len(targets.ids_Sx2) * len(self.train) * max(self.steps, 1)),
                self.steps,
            )
            longest = self.config.top * sufficiency.SIZES[-1]
            for each, attribution_SxF in zip(group, attributions, strict=True):
                # Attribution is linear in the target.
                sets = (leaders(weight_S @ attribution_SxF, longest) for weight_S in targets.weight_RxS)
                each._placebos = list(zip(targets.names, sets, strict=True))

    def _readout_targets(self) -> PlaceboTargets | None:
        """Return the user's placebo readouts; None if there are none."""
        if not self.placebo_readout:
            return None
        count = len(self.placebo_readout.functions)
        ids_Sx2 = np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1)
        return PlaceboTargets(ids_Sx2, np.eye(count), [None] * count)

    def _token_targets(self) -> PlaceboTargets | None:
        """Return pairs of likely tokens; None if no targets are wanted, or there are too few tokens."""
        tokens = self.placebo_tokens()
        pairs_Rx2 = token_pairs(np.arange(len(tokens)), self.config.seed)
        if not len(pairs_Rx2):
            return None
        texts = [self.lm.tokenizer.decode([int(token)]) for token in tokens]
        # A pair's attribution is the difference of both tokens' against a third.
        ids_Sx2 = np.stack([tokens[1:], np.broadcast_to(tokens[0], len(tokens) - 1)], axis=1)
        one_NxS = np.eye(len(tokens))[:, 1:]
        weight_RxS = one_NxS[pairs_Rx2[:, 0]] - one_NxS[pairs_Rx2[:, 1]]
        return PlaceboTargets(ids_Sx2, weight_RxS, [(texts[right], texts[wrong]) for right, wrong in pairs_Rx2])

    def placebo_tokens(self) -> np.ndarray:
        """Return likely tokens that are no answers, drawn at random; none if no targets are wanted."""
        if not self.config.placebo_targets:
            return np.zeros(0, np.int64)
        wanted, most = max(TOKENS, self.config.placebo_targets), LIKELY
        # Prompts of one template have few likely tokens: less likely ones are taken, too.
        while len(tokens := self.other_tokens(self.train_runs, most)) < wanted and most < self.split.point.config.vocab:
            most *= 2
        return np.random.default_rng(self.config.seed).permutation(tokens)[:wanted]

    def other_tokens(self, runs: Sequence[CleanRun], most: int) -> np.ndarray:
        """Return the tokens that are among the ``most`` likeliest after some prompt and are, or begin, no answer.

        Answers are both splits' and further right ones; where all are numbers, every number may be right.
        """
        answers = {text for prompt in self.prompts for text in (prompt.correct, prompt.wrong)}
        are_numbers = all(answer.strip().isdecimal() for answer in answers)
        tokenizer, likely = self.lm.tokenizer, likely_tokens(self.split, runs, most)
        tokens = neutral_tokens(tokenizer, likely, answers | {*EQUIVALENTS.get(self.behaviour, ())})
        is_number = [are_numbers and tokenizer.decode([token]).strip().isdecimal() for token in tokens.tolist()]
        return tokens[~np.array(is_number, bool)]

    def ranked_tokens(self) -> np.ndarray:
        """Return which tokens are other answers, bool [V]."""
        is_allowed_V = np.zeros(self.split.point.config.vocab, bool)
        is_allowed_V[self.other_tokens(self.runs, RANKED)] = True
        return is_allowed_V

    def keep(self, sets: Sequence[Sequence[int]]) -> np.ndarray | None:
        """Return the logit differences where some features alone are kept, as ``sufficiency.keep_features`` does."""
        if isinstance(self.basis, SeveralSites):  # what a site of features alone holds is not what its edits leave
            return None
        mean_F = activity.statistics(self.split, self.train_runs).mean_F.astype(np.float32)
        values_2xExP = sufficiency.keep_features(self.split, self.runs, mean_F, sets)
        self.progress.of_call(2 * len(sets) * len(self.test))(1, 1)
        return values_2xExP

    def ranks(self, edit: EditDefinition) -> EffectsTable | None:
        """Return the logits of the likeliest tokens that are no answers, without and with an edit."""
        if self.readout:  # which is no difference of tokens
            return None
        is_allowed_V = self.ranked_tokens()
        most = min(len(RANKS), int(is_allowed_V.sum()))
        if not most:
            return None
        values_2xRxP = rank_logits(self.split, self.runs, self.edits([edit]), is_allowed_V, most)
        values = dict(zip(RANKS, np.moveaxis(values_2xRxP, 1, 0), strict=False))
        return EffectsTable.block([self.clean, edit], self.tests, values)


def measure_behaviour(
    tested: BehaviourAblation,
    prompts: Mapping[str, Sequence[Prompt]],
    text: HeldOutText | None = None,
    repeats: Mapping[str, Dictionary] | None = None,
) -> EffectsTable:
    """Return what the verdict needs: measurements of the tested dictionary, untrained ones, simpler bases, other seeds.

    Args:
      tested: the tested dictionary on the behaviour; for further measurements it can be used again.
      prompts: prompts of the other behaviours; T is ablated there, too.
      text: held-out documents, if there are any.
      repeats: dictionaries of other seeds, by name.

    Returns:
      The table. Where T is empty it holds the unedited model alone.

    Raises:
      UserError: a dictionary does not fit the model, or repeats do not go with the settings.
    """
    config = tested.config
    keeps_error = config.error == "keep"  # otherwise the clean run belongs to the tested dictionary alone
    if repeats and not keeps_error:
        raise UserError("with error=drop the clean run is that of one dictionary: test the repeats by themselves")
    if not tested.top():  # question 5 of other behaviours looks at this one, too
        return tested.table([], np.zeros((0, len(tested.test))), full=True)
    others = {name: tested.with_basis(repeat) for name, repeat in (repeats or {}).items()}
    # Before anything is measured, so that the slopes of placebo targets are computed once for all dictionaries.
    tested.choose_placebos(list(others.values()))
    tables, dose = _measure_dictionary(tested, TESTED, prompts, text)
    # One without a feature that could lower the answer has no answers on this behaviour, which the verdict says.
    others = {name: other for name, other in others.items() if other.top()}
    for name, other in others.items():
        tables += _measure_dictionary(other, name, prompts, text)[0]
    for name, each in {TESTED: tested, **others}.items():
        tables += _measure_kept(each, "top", [_by_attribution(each)], dictionary=name)
    tables += _measure_kept(tested, "placebo", [members for _, members in tested.placebo_orders() if members])
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
      behaviour: its name.
      features: number of features of the dictionary.
      documents: number of held-out documents.
    """
    test = sum(prompt.split == "test" for prompt in prompts[behaviour])
    train = sum(prompt.split == "train" for prompt in prompts[behaviour])
    trainings = 1 + len(config.repeats)
    keeps_error = config.error == "keep"  # otherwise there are neither untrained dictionaries nor simpler bases
    untrained, baselines = config.untrained_dictionaries * keeps_error, len(config.baselines) * keeps_error
    edits = trainings * (len(FRACTIONS) + config.random_sets + config.placebo_targets + bool(untrained))
    edits += config.top + baselines + untrained
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
    return test * edits + chosen + (others + documents) * trainings


def begin_ablation(
    lm: LanguageModel,
    basis: Dictionary,
    behaviour: str,
    prompts: Mapping[str, Sequence[Prompt]],
    config: AblateConfig,
    on_progress: OnProgress,
    documents: int = 0,
    **options: Any,
) -> BehaviourAblation:
    """Return the ablation of a dictionary on one behaviour, which reports its progress in rows.

    Args:
      lm: the model.
      basis: the dictionary.
      behaviour: its name.
      prompts: prompts of all behaviours, by name.
      config: settings of the ablation.
      on_progress: called with the rows done and expected; may raise to stop.
      documents: number of held-out documents.
      **options: further fields of ``BehaviourAblation``.
    """
    rows = expected_rows(config, prompts, behaviour, basis.config.n_features, documents)
    return BehaviourAblation(
        lm, basis, behaviour, prompts[behaviour], config, RowProgress(on_progress, rows), **options
    )


def _measure_dictionary(
    ablation: BehaviourAblation, name: str, prompts: Mapping[str, Sequence[Prompt]], text: HeldOutText | None
) -> tuple[list[EffectsTable], float]:
    """Measure one dictionary; return its tables and the dose of T."""
    top = ablation.top()

    def define(group: str, members: Sequence[int], index: int = 0, fraction: float = 1.0, target=None):
        features = tuple(int(feature) for feature in members)
        return EditDefinition(ablation.behaviour, group, index, features, fraction, name, target)

    grid = [define("top", top, fraction=fraction) for fraction in FRACTIONS]
    singles = [define("single", [feature], index) for index, feature in enumerate(top)] if name == TESTED else []
    norm_ExP = ablation.norms([grid[-1], *singles])
    dose = root_mean_square(norm_ExP[0])
    # The change is linear in the fraction, and so is its norm.
    norms = np.concatenate([np.outer(FRACTIONS, norm_ExP[0]), norm_ExP[1:]])
    tables = [ablation.table([*grid, *singles], norms, full=True)]
    config, controls = ablation.config, list[EditDefinition]()
    if dose > 0:
        counts = config.random_sets, config.placebo_targets
        sets = ablation.placebo_sets()
        controls = control_edits(define, ablation.changes, ablation.pool(top), sets, dose, counts, config.seed)
    run = [edit for edit in controls if edit.group != "pool"]
    if run:
        # Without the readouts that take the logits of the whole vocabulary: they are compared on the objective.
        tables.append(ablation.table(run, ablation.norms(run)))
    tables.append(EffectsTable((*controls,), (), *np.zeros((4, 0), np.int64)))
    if ranks := ablation.ranks(grid[-1]):
        tables.append(ranks)
    behaviours = [item for item in prompts.items() if item[0] != ablation.behaviour]
    # Together, so that few programs are compiled; but random activations are drawn from all prompts of a call.
    for group in [[item] for item in behaviours] if config.replacement == "random" else [behaviours]:
        tests = [prompt for _, each in group for prompt in each if prompt.split == "test"]
        if tests:
            values = ablation.run(grid[-1:], tests)
            definitions = [prompt for item in group for prompt in define_prompts(*item) if prompt.split == "test"]
            edited = {name: value_ExP[1:] for name, value_ExP in values.items()}
            tables.append(EffectsTable.block(grid[-1:], definitions, edited))
    if text:
        tables.append(_measure_text(ablation, grid[-1], text))
    if name == TESTED and config.effects == "all":
        tables.append(_measure_every(ablation))
    return tables, dose


def _measure_untrained(tested: BehaviourAblation, dose: float) -> list[EffectsTable]:
    """Measure the tested dictionary and untrained ones, one at a time, by the same function."""
    config, statistics = tested.config, tested.statistics
    # As sparse as the dictionary on these prompts, or they would change more or fewer directions at a time.
    active = round(statistics.fires_F.sum() / max(statistics.positions, 1))
    tables, like = _measure_list(tested.with_basis(tested.basis, like=tested), "trained", 0, dose), tested
    for index in range(config.untrained_dictionaries):
        basis = (
            tested.basis.untrained(statistics.fires_F, statistics.positions, config.seed + index)
            if isinstance(tested.basis, SeveralSites)
            else bases.untrained(tested.basis, active, config.seed + index)
        )
        untrained = tested.with_basis(basis, like=like)
        # Of a transcoder they read another site: its runs and slopes are shared among them.
        like = like if untrained.split.point == like.split.point else untrained
        site = basis.site if basis.site != tested.basis.site else ""
        tables += _measure_list(untrained, "untrained", index, dose, site)
        if index < sufficiency.CONTROLS and (order := _by_attribution(untrained)):
            tables += _measure_kept(untrained, "untrained", [order], index)
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
      ablation: of the lists' dictionary.
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
    values_2xExP = ablation.keep(list(sets.values())) if sets else None
    if values_2xExP is None:
        return []
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
    members, fraction = list_to_dose(ablation.changes, order, dose)
    edit = EditDefinition(ablation.behaviour, group, index, members, fraction, dictionary, site=site)
    return [ablation.table([edit], ablation.norms([edit]))]


def _measure_every(ablation: BehaviourAblation) -> EffectsTable:
    """Measure every feature that fires on the test prompts, one by one."""
    # The effect of a feature that never fires is known to be 0.
    live = np.flatnonzero(ablation.statistics.prompts_F > 0)
    every = [EditDefinition(ablation.behaviour, "every", int(i), (int(i),)) for i in live]
    return EffectsTable.block([ablation.clean, *every], ablation.tests, ablation.run(every, snap_rounding=True))


def _measure_text(ablation: BehaviourAblation, edit: EditDefinition, text: HeldOutText) -> EffectsTable:
    """Measure an edit, and no edit, on held-out text."""
    values = dict(ce=text.effects(ablation.split, ablation.edits([edit])))
    ablation.progress.of_call(len(text.documents))(1, 1)
    documents = [PromptDefinition(f"{TEXT}/{number:05d}", TEXT) for number in range(len(text.documents))]
    return EffectsTable.block([EditDefinition(TEXT, "clean"), edit], documents, values)


def root_mean_square(norm_P: np.ndarray) -> float:
    """Return the dose of an edit, given the norm of its change on each prompt."""
    return float(np.sqrt(np.mean(np.square(norm_P))))


def _on_basis(tested: BehaviourAblation, name: str) -> BehaviourAblation | None:
    """Return a simpler basis on the behaviour of a dictionary; None where it cannot be had."""
    dictionary, lm = tested.basis, tested.lm
    if isinstance(dictionary, SeveralSites):  # there is no such basis of several sites
        return None
    if name not in BASES:
        return tested.with_basis(load_dictionary(name, mesh=lm.mesh))
    if name == "neurons":
        if isinstance(lm.config, TorchConfig):  # which has no table of its weights
            return None
        site = Site.parse(dictionary.config.target or dictionary.site)
        # Where a norm follows the MLP, or the MLP reads the site, a neuron has no direction at the site's scale. Of
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
    return tested.with_basis(directions, like=tested) if directions is not None else None


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
