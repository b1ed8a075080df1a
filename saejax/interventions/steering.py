"""Steering: a prompt's answer turned into that of its counterpart by a change of one site.

A *text* is a train prompt, or its counterpart, to which the prompt's wrong answer is right; it is read at its last
position. Steering from answer c to answer w uses one of

- ``add``: the mean change of the top features' activations, from texts whose answer is c to texts whose answer is w, is
  added. The top features have the largest change times slope of the logit difference;
- ``clamp``: these features are set to a multiple of their mean activation on texts whose answer is w (Templeton et al.,
  2024);
- ``mean_difference``: the difference between the site's mean values on the two kinds of text is added (Rimsky et al.,
  2024, arXiv 2312.06681).

Controls are added at the same norm, so that doses are equal:

- *random features*: disjoint sets of as many features, drawn from those that fire on at least 5 % of the test prompts,
  without the top ones, each added in proportion to its mean activation on the texts;
- *random directions*: differences of means after the answers were shuffled among the texts. They lie where values of
  these texts differ, and are harder to beat than directions that no value ever takes.

All changes are edits (``saejax.interventions.edits``) at the editable positions but attention sinks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.interventions import bases
from saejax.interventions.ablation import MIN_FIRING
from saejax.interventions.edits import FeatureEdits, add
from saejax.interventions.engine import BATCH_ROWS, OnProgress, change_norms, run_edits
from saejax.interventions.slopes import leaders, slopes
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.statistics.partition import disjoint_sets
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

METHODS = ("add", "clamp", "mean_difference")
MIN_TEXTS = 3  # texts of an answer, of which a mean is taken
FACTORS = (1.0, 2.0, 4.0, 8.0)  # of the activation that features are clamped to


class AnswerSwap(NamedTuple):
    """Two answers, as ids of their first tokens: a prompt's, and the one that it is steered to."""

    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class AnswerTexts:
    """N texts at their last positions."""

    answer_N: np.ndarray  #: token ids of their right answers
    value_NxD: np.ndarray  #: values of the site that is changed
    slope_NxD: np.ndarray  #: gradient of logit(right) - logit(wrong) at that site
    f_NxF: np.ndarray  #: activations of the features
    W_dec_FxD: np.ndarray  #: directions of the features
    norm: float  #: mean norm of the site's values at editable positions

    @classmethod
    def read(cls, lm: LanguageModel, split: SplitModel, prompts: Sequence[Prompt]) -> "AnswerTexts":
        """Read the texts of train prompts; those without a counterpart give one text."""
        turned = [
            dataclasses.replace(p, text=p.counterpart, correct=p.wrong, wrong=p.correct, counterpart=p.text)
            for p in prompts
            if p.counterpart
        ]
        texts = [*prompts, *turned]
        last_N = lm.tokenize([text.text for text in texts]).last_B
        slope_NxD = slopes(lm, texts, "logit_diff", str(split.point.site))[np.arange(len(texts)), last_N]
        answer_N, value_NxD = np.zeros(len(texts), np.int64), np.zeros(slope_NxD.shape, np.float32)
        f_NxF, norms = np.zeros((len(texts), split.dictionary.config.n_features), np.float32), []
        for run in split.run(texts):
            count, rows_B = len(run.index_P), np.arange(len(run.last_B))
            value_BxTxD = to_host(run.value_BxTxD)
            answer_N[run.index_P] = run.answers_Bx2[:count, 0]
            value_NxD[run.index_P] = value_BxTxD[rows_B, run.last_B][:count]
            f_NxF[run.index_P] = to_host(split.dictionary.encode(run.read_BxTxD[rows_B, run.last_B]))[:count]
            norm_PxT = np.linalg.norm(value_BxTxD[:count].astype(np.float64), axis=-1)
            norms += norm_PxT[to_host(run.domain_BxT)[:count]].tolist()
        W_dec_FxD = np.asarray(split.dictionary.W_dec_FxD[...], np.float32)
        return cls(answer_N, value_NxD, slope_NxD, f_NxF, W_dec_FxD, float(np.mean(norms)) if norms else 0.0)

    def covers(self, swap: AnswerSwap) -> bool:
        """Return whether there are enough texts of both answers."""
        return all((self.answer_N == answer).sum() >= MIN_TEXTS for answer in swap)

    def mean_difference(self, values_Nx: np.ndarray, swap: AnswerSwap) -> np.ndarray:
        """Return the mean of values over texts of the target answer, less that over texts of the source answer."""
        source, target = (values_Nx[self.answer_N == answer].mean(axis=0, dtype=np.float64) for answer in swap)
        return target - source

    def top(self, swap: AnswerSwap, count: int) -> list[int]:
        """Return the features of largest change times slope, at most ``count``, those above zero alone."""
        slope_D = self.mean_difference(self.slope_NxD, swap) / 2  # texts of either answer have opposite slopes
        return leaders(self.mean_difference(self.f_NxF, swap) * (self.W_dec_FxD @ slope_D), count)


def strengths_of(method: str, doses: Sequence[float]) -> tuple[float, ...]:
    """Return the strengths of a method: factors of activations for ``clamp``, otherwise doses."""
    return FACTORS if method == "clamp" else tuple(doses)


def steering_edits(
    texts: AnswerTexts,
    dictionary: Dictionary,
    method: str,
    swap: AnswerSwap,
    features: Sequence[int],
    strengths: Sequence[float],
) -> FeatureEdits:
    """Return the edits of a method, one for each strength.

    Args:
      texts: the texts that it is learned on.
      dictionary: the dictionary of the features, at whose site the change is made.
      method: one of ``METHODS``.
      swap: the answers.
      features: the top features of the swap.
      strengths: norms of what is added, in mean norms of the site's values; for ``clamp`` factors of the features' mean
        activations on texts of the target answer.
    """
    chosen = np.asarray(features, np.int64)
    if method == "clamp":
        level_K = texts.f_NxF[texts.answer_N == swap.target][:, chosen].mean(axis=0, dtype=np.float64)
        count, whole_K = len(strengths), np.ones(len(chosen))
        levels = tuple(strength * level_K for strength in strengths)
        return FeatureEdits(dictionary, (chosen,) * count, (whole_K,) * count, levels)
    if method == "add":
        vector_D = texts.mean_difference(texts.f_NxF[:, chosen], swap) @ texts.W_dec_FxD[chosen]
    else:
        vector_D = texts.mean_difference(texts.value_NxD, swap)
    return vector_edits(dictionary, [strength * texts.norm * _unit(vector_D) for strength in strengths])


def vector_edits(dictionary: Dictionary, vectors: Sequence[np.ndarray]) -> FeatureEdits:
    """Return edits that add a vector each at the site that a dictionary writes to."""
    # With the dictionary's rule for attention sinks, which are left alone.
    return add(bases.linear(dictionary, np.stack(vectors)), [[number] for number in range(len(vectors))], 1.0)


def random_feature_vectors(
    texts: AnswerTexts, share_F: np.ndarray, top: Sequence[int], count: int, seed: int
) -> list[np.ndarray]:
    """Return vectors of norm 1 that add disjoint random sets of as many features as the top ones.

    Args:
      texts: their mean activations weight the features of a set.
      share_F: share of the test prompts on which each feature fires; those of the pool fire on at least 5 %.
      top: the top features, which are left out; at least one.
      count: maximum number of sets.
      seed: seed of the draw.
    """
    pool = np.setdiff1d(np.flatnonzero(share_F >= MIN_FIRING), np.asarray(top, np.int64))
    mean_F = texts.f_NxF.mean(axis=0, dtype=np.float64)
    # A feature that fires on no text at the last position still gets a share.
    mean_F = np.maximum(mean_F, max(float(mean_F[pool].max(initial=0.0)) * 1e-3, 1e-6))
    sets = disjoint_sets(pool, len(top), count, seed)
    return [_unit(mean_F[members] @ texts.W_dec_FxD[members]) for members in sets]


def random_directions(texts: AnswerTexts, swap: AnswerSwap, count: int, seed: int) -> list[np.ndarray]:
    """Return ``count`` differences of means of texts whose answers were shuffled by ``seed``, of norm 1."""
    shuffled = (np.random.default_rng([seed, number]).permutation(texts.answer_N) for number in range(count))
    drawn = (dataclasses.replace(texts, answer_N=answer_N) for answer_N in shuffled)
    return [_unit(each.mean_difference(each.value_NxD, swap)) for each in drawn]


class Steered(NamedTuple):
    """Readouts of S changes on P prompts, float64 [S, P]."""

    diff_SxP: np.ndarray  #: logit(answer) - logit(target)
    norm_SxP: np.ndarray  #: norm of the change at the site, over all positions


def place_edits(lm: LanguageModel, split: SplitModel, edits: FeatureEdits) -> tuple[SplitModel, FeatureEdits]:
    """Return the model split for the edits' dictionary, which may be another basis at the site, and edits of it."""
    edited = split if edits.dictionary is split.dictionary else SplitModel(lm, edits.dictionary)
    return edited, dataclasses.replace(edits, dictionary=edited.dictionary)


def steer(
    lm: LanguageModel,
    split: SplitModel,
    prompts: Sequence[Prompt],
    edits: FeatureEdits,
    batch_rows: int = BATCH_ROWS,
    on_progress: OnProgress = lambda done, total: None,
) -> Steered:
    """Run every edit on every prompt.

    Args:
      lm: the model.
      split: the model, split at the dictionary's site.
      prompts: P prompts.
      edits: S edits of the dictionary's features, or of other directions at its site.
      batch_rows: as for ``effects``.
      on_progress: called with the tokens done and in total; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    split, edits = place_edits(lm, split, edits)
    runs = split.run(prompts)
    diff_SxP = run_edits(split, runs, edits, batch_rows, on_progress)["logit_diff"][1:]
    return Steered(diff_SxP, change_norms(split, runs, edits))


def choose_strength(diff_SxP: np.ndarray, is_allowed_S: np.ndarray) -> int:
    """Return the strength that turns most prompts, of those allowed; of equal ones that of the lowest mean difference.

    Args:
      diff_SxP: logit differences of train prompts at S rising strengths.
      is_allowed_S: which may be chosen; the first one if none may.
    """
    order = sorted(np.flatnonzero(is_allowed_S), key=lambda s: (-(diff_SxP[s] < 0).mean(), diff_SxP[s].mean()))
    return int(order[0]) if order else 0


def group_by_swap(lm: LanguageModel, prompts: Sequence[Prompt]) -> dict[AnswerSwap, list[int]]:
    """Return the indices of the prompts of each pair of answers, the most frequent pair first."""
    groups: dict[AnswerSwap, list[int]] = {}
    for place, answers in enumerate(first_answer_ids(lm.tokenizer, prompts).tolist() if prompts else ()):
        groups.setdefault(AnswerSwap(*answers), []).append(place)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def map_swaps(
    groups: Mapping[AnswerSwap, Sequence[int]],
    prompts: Sequence[Prompt],
    run: Callable[[AnswerSwap, list[Prompt]], Steered],
) -> Steered:
    """Run the prompts of each pair of answers by themselves, and return the readouts of all in their order."""
    parts = [(places, run(swap, [prompts[place] for place in places])) for swap, places in groups.items()]
    order = np.argsort(np.concatenate([places for places, _ in parts]))
    columns = zip(*(part for _, part in parts), strict=True)
    return Steered(*(np.concatenate(column, axis=1)[:, order] for column in columns))


def _unit(vector_D: np.ndarray) -> np.ndarray:
    """Return a vector of norm 1, or 0 if it has none."""
    norm = float(np.linalg.norm(vector_D))
    return vector_D / norm if norm > 0 else vector_D
