"""Prompts of a behaviour under edits, their attribution, and the other answers that the model might give to them.

Other answers are tokens that are likely after these prompts and are, or begin, none of their answers. Pairs of them are
placebo targets; the likeliest ones after each prompt are ranked without and with an edit.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.interventions import activity, sufficiency
from saejax.interventions.activity import FeatureStatistics
from saejax.interventions.controls import Changes, measure_changes, token_pairs
from saejax.interventions.edits import ActivationReplacement, FeatureEdits
from saejax.interventions.engine import change_norms, gathered_prompts, rank_logits, run_edits
from saejax.interventions.settings import AblateConfig
from saejax.interventions.slopes import (
    AnswerSlopes,
    answer_slopes,
    attribution,
    leaders,
    likely_tokens,
    neutral_tokens,
    target_attributions,
)
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.interventions.table import RANKS
from saejax.models.split import Readout, SplitPoint
from saejax.progress import OnProgress, silent
from saejax.tasks.behaviours import Prompt

LIKELY = 40  # a placebo token is among this many most likely ones
TOKENS = 80  # placebo tokens, at least: each is in at most four pairs
STEPS = 10  # of the path of integrated attribution: Marks et al. use as many
RANKED = 400  # likeliest tokens of each prompt among which other answers are looked for
#: Further right answers of a behaviour, as text: they are no other questions to which T should be indifferent.
EQUIVALENTS: Mapping[str, tuple[str, ...]] = dict(
    agreement=(" was", " were", " has", " have", " does", " do", "'s", "'re", " isn", " aren", " wasn", " weren")
)
#: Placebo targets, as text if they are two tokens, and features of each by falling attribution.
PlaceboSets = list[tuple[tuple[str, str] | None, list[int]]]


class PlaceboTargets(NamedTuple):
    """R placebo targets, as sums of S targets whose attribution is measured."""

    ids_Sx2: np.ndarray  #: two tokens, whose logits are subtracted, or in the first column the number of a readout
    weight_RxS: np.ndarray  #: attribution is linear in the target: the weight of each in the sum
    names: Sequence[tuple[str, str] | None]  #: of the R targets, two tokens as text; None of a readout


@dataclasses.dataclass
class BehaviourPrompts:
    """Prompts of a behaviour on a model split at a dictionary's site; what ``References`` is for whole answers."""

    split: SplitModel  #: the model
    prompts: Sequence[Prompt]  #: the prompts
    config: AblateConfig = dataclasses.field(default_factory=AblateConfig)  #: settings of the ablation
    answers: frozenset[str] = frozenset()  #: right and wrong answers of all prompts of the behaviour, and further ones
    length: int = 0  #: tokens to which shorter prompts are padded, so that both splits share programs
    placebo_readout: Readout | None = None  #: readouts of whose top features placebo sets are made; None: of tokens
    train: "BehaviourPrompts | None" = None  #: prompts whose mean activations may replace others; None: these

    def __len__(self) -> int:
        return len(self.prompts)

    def with_split(self, split: SplitModel, train: "BehaviourPrompts | None" = None) -> "BehaviourPrompts":
        """Return the prompts for another dictionary; clean runs and slopes that do not depend on it are used again.

        Args:
          split: the model, split at the dictionary's site.
          train: the prompts whose mean activations may replace others, with the same split.
        """
        other = dataclasses.replace(self, split=split, train=train)
        if split.reads_like(self.split):
            other.runs = self.runs
            # Slopes along the path of one dictionary are not another's.
            if "slopes" in vars(self) and not self.steps:
                other.slopes = self.slopes
        return other

    @functools.cached_property
    def runs(self) -> list[CleanRun]:
        """The prompts run without an edit."""
        # Counterparts double the clean runs, so they are run where they are needed only.
        return self.split.run(self.prompts, self.config.replacement == "counterpart", self.length)

    @functools.cached_property
    def replacement(self) -> ActivationReplacement:
        """The replacement of the activations of ablated features."""
        kind, config = self.config.replacement, self.config
        mean_F = (self.train or self).statistics().mean_F if kind == "mean" else None
        seed = np.uint32(config.seed) if kind == "random" else None
        return ActivationReplacement(kind, mean_F=mean_F, seed=seed)

    @property
    def steps(self) -> int:
        """The points over which slopes are averaged; 0: the slope without an edit."""
        return STEPS if self.config.attribution == "integrated" else 0

    @functools.cached_property
    def slopes(self) -> list[list[AnswerSlopes]]:
        """Slopes of the answers, which dictionaries of the site share."""
        return answer_slopes(self.split, self.runs, self.replacement, self.steps)

    @property
    def attribution_F(self) -> np.ndarray:
        """The attribution of each feature, mean over the prompts, measured anew at each call."""
        return attribution(self.split, self.runs, self.replacement, self.steps, self.slopes)

    def statistics(self) -> FeatureStatistics:
        """Return firing statistics of every feature."""
        return activity.statistics(self.split, self.runs)

    def changes(self, features: Sequence[int] | np.ndarray) -> Changes:
        """Return the changes that ablating each of some features makes, alone and with each other."""
        return measure_changes(gathered_prompts(self.split, self.runs, self.replacement), features, len(self))

    def change_norms(self, edits: FeatureEdits) -> np.ndarray:
        """Return the norm of each edit's change at the site on each prompt, [E, P]."""
        return change_norms(self.split, self.runs, edits)

    def measure(
        self, edits: FeatureEdits, on_progress: OnProgress = silent, full: bool = False, snap_rounding: bool = False
    ) -> dict[str, np.ndarray]:
        """Return readouts on the prompts, [1 + E, P] each: without an edit, then with each edit.

        Args:
          edits: what is run.
          on_progress: called with the rows done and in total; may raise to stop.
          full: whether all readouts are measured, which takes the logits of the whole vocabulary; of a user's readout
            there are no others.
          snap_rounding: as for ``run_edits``.
        """
        full = full and not self.split.point.readout
        rows = self.config.batch_rows
        values = run_edits(self.split, self.runs, edits, rows, on_progress, full, snap_rounding)
        if full:
            values["two_way"] = (values["logit_diff"] > 0).astype(np.float64)
        return values

    def site_values(self) -> np.ndarray:
        """Return the site's values at editable positions, [N, D]."""
        parts = []
        for run in self.runs:
            count = len(run.index_P)
            parts.append(np.asarray(run.value_BxTxD[:count], np.float32)[np.asarray(run.domain_BxT[:count])])
        return np.concatenate(parts)

    def answer_means(self) -> np.ndarray:
        """Return the site's mean last value on the prompts of each of G correct answers, [G, D]."""
        values: dict[int, list[np.ndarray]] = {}
        for run in self.runs:
            for row in range(len(run.index_P)):
                value_D = np.asarray(run.value_BxTxD[row, run.last_B[row]], np.float64)
                values.setdefault(int(run.answers_Bx2[row, 0]), []).append(value_D)
        # By token id, so that the result does not depend on the order of prompts.
        return np.stack([np.mean(rows, axis=0) for _, rows in sorted(values.items())])

    def other_tokens(self, most: int) -> np.ndarray:
        """Return the tokens that are among the ``most`` likeliest after some prompt and are, or begin, no answer."""
        return neutral_tokens(self.split.lm.tokenizer, likely_tokens(self.split, self.runs, most), self.answers)

    def ranks(self, edit: FeatureEdits) -> dict[str, np.ndarray]:
        """Return the logits of the likeliest tokens that are no answers, [2, P] each: without and with an edit."""
        if self.split.point.readout:  # which is no difference of tokens
            return {}
        is_allowed_V = np.zeros(self.split.point.config.vocab, bool)
        is_allowed_V[self.other_tokens(RANKED)] = True
        most = min(len(RANKS), int(is_allowed_V.sum()))
        if not most:
            return {}
        values_2xRxP = rank_logits(self.split, self.runs, edit, is_allowed_V, most)
        return dict(zip(RANKS, np.moveaxis(values_2xRxP, 1, 0), strict=False))

    def placebo_targets(self) -> PlaceboTargets | None:
        """Return the user's placebo readouts, or pairs of likely tokens; None if there are none, or none are wanted."""
        if self.placebo_readout:
            count = len(self.placebo_readout.functions)
            ids_Sx2 = np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1)
            return PlaceboTargets(ids_Sx2, np.eye(count), [None] * count)
        if self.split.point.readout or not self.config.placebo_targets:
            return None
        wanted, most = max(TOKENS, self.config.placebo_targets), LIKELY
        # Prompts of one template have few likely tokens: less likely ones are taken, too.
        while len(tokens := self.other_tokens(most)) < wanted and most < self.split.point.config.vocab:
            most *= 2
        tokens = np.random.default_rng(self.config.seed).permutation(tokens)[:wanted]
        pairs_Rx2 = token_pairs(np.arange(len(tokens)), self.config.seed)
        if not len(pairs_Rx2):
            return None
        texts = [self.split.lm.tokenizer.decode([int(token)]) for token in tokens]
        # A pair's attribution is the difference of both tokens' against a third.
        ids_Sx2 = np.stack([tokens[1:], np.broadcast_to(tokens[0], len(tokens) - 1)], axis=1)
        one_NxS = np.eye(len(tokens))[:, 1:]
        weight_RxS = one_NxS[pairs_Rx2[:, 0]] - one_NxS[pairs_Rx2[:, 1]]
        return PlaceboTargets(ids_Sx2, weight_RxS, [(texts[right], texts[wrong]) for right, wrong in pairs_Rx2])


def prompt_placebos(trains: Sequence[BehaviourPrompts], on_rows: Callable[[int], OnProgress]) -> list[PlaceboSets]:
    """Return the placebo sets of some dictionaries, with as many features of each as question 6 keeps.

    Dictionaries of one site have the same targets and slopes, which take most of the time.

    Args:
      trains: the train prompts of one behaviour, for each dictionary.
      on_rows: number of rows that a call runs -> its progress function.
    """
    # Mean activations belong to each dictionary's features, and so does the path.
    is_separate = trains[0].replacement.kind == "mean" or trains[0].steps > 0
    groups: dict[tuple[SplitPoint, int], list[int]] = {}
    for place, train in enumerate(trains):
        groups.setdefault((train.split.point, place * is_separate), []).append(place)
    chosen: list[PlaceboSets] = [[] for _ in trains]
    for places in groups.values():
        group = [trains[place] for place in places]
        targets, steps, readout = group[0].placebo_targets(), group[0].steps, group[0].placebo_readout
        if not targets:
            continue
        # A swapped activation is one draw of a random one: targets are ranked by what zero ablation would do.
        source = group[0].replacement if group[0].replacement.kind != "counterpart" else ActivationReplacement()
        splits = [train.split.with_readout(readout) if readout else train.split for train in group]
        on_progress = on_rows(len(targets.ids_Sx2) * len(group[0]) * max(steps, 1))
        runs = [train.runs for train in group]
        sums = target_attributions(splits, runs, targets.ids_Sx2, source, on_progress, steps)
        longest = group[0].config.top * sufficiency.SIZES[-1]
        for place, attribution_SxF in zip(places, sums, strict=True):
            # Attribution is linear in the target.
            sets = (leaders(weight_S @ attribution_SxF, longest) for weight_S in targets.weight_RxS)
            chosen[place] = list(zip(targets.names, sets, strict=True))
    return chosen
