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

All changes act at the editable positions but attention sinks, and run through ``saejax.interventions.engine``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.interventions.ablation import MIN_FIRING
from saejax.interventions.edits import FeatureEdits, add
from saejax.interventions.engine import BATCH_ROWS, OnProgress, change_norms, run_edits
from saejax.interventions.slopes import leaders, slopes
from saejax.interventions.split_model import SplitModel
from saejax.interventions.text import HeldOutText
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.statistics.partition import disjoint_sets
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

METHODS = ("add", "clamp", "mean_difference")
MIN_TEXTS = 3  # texts of an answer, of which a mean is taken
FACTORS = (1.0, 2.0, 4.0, 8.0)  # of the activation that features are clamped to
TEXT_SWAPS = 4  # answer pairs whose changes are tried on held-out text


class AnswerSwap(NamedTuple):
    """Two answers, as ids of their first tokens: a prompt's, and the one that it is steered to."""

    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class AnswerTexts:
    """N texts at their last positions.

    Attributes:
      answer_N: token ids of their right answers.
      value_NxD: values of the site that is changed.
      slope_NxD: gradient of logit(right) - logit(wrong) at that site.
      f_NxF: activations of the features.
      W_dec_FxD: directions of the features.
      norm: mean norm of the site's values at editable positions.
    """

    answer_N: np.ndarray
    value_NxD: np.ndarray
    slope_NxD: np.ndarray
    f_NxF: np.ndarray
    W_dec_FxD: np.ndarray
    norm: float

    @classmethod
    def read(cls, lm: LanguageModel, split: SplitModel, prompts: Sequence[Prompt]) -> "AnswerTexts":
        """Read the texts of train prompts.

        Args:
          lm: the model.
          split: the model, split at the dictionary's site.
          prompts: train prompts; those without a counterpart give one text.
        """
        turned = [
            dataclasses.replace(p, text=p.counterpart, correct=p.wrong, wrong=p.correct, counterpart=p.text)
            for p in prompts
            if p.counterpart
        ]
        texts = [*prompts, *turned]
        slope_NxTxD = slopes(lm, texts, "logit_diff", str(split.point.site))
        last_N = lm.tokenize([text.text for text in texts]).last_B
        slope_NxD = slope_NxTxD[np.arange(len(texts)), last_N]
        answer_N, value_NxD = np.zeros(len(texts), np.int64), np.zeros(slope_NxD.shape, np.float32)
        f_NxF, norms = np.zeros((len(texts), split.dictionary.config.n_features), np.float32), []
        for run in split.run(texts):
            count, rows_B = len(run.index_P), np.arange(len(run.last_B))
            value_BxTxD = to_host(run.value_BxTxD)
            read_BxD = run.read_BxTxD[rows_B, run.last_B]
            answer_N[run.index_P] = run.answers_Bx2[:count, 0]
            value_NxD[run.index_P] = value_BxTxD[rows_B, run.last_B][:count]
            f_NxF[run.index_P] = to_host(split.dictionary.encode(read_BxD))[:count]
            norm_PxT = np.linalg.norm(value_BxTxD[:count].astype(np.float64), axis=-1)
            norms.append(norm_PxT[to_host(run.domain_BxT)[:count]])
        norm = float(np.mean(np.concatenate(norms))) if sum(map(len, norms)) else 0.0
        W_dec_FxD = np.asarray(split.dictionary.W_dec_FxD[...], np.float32)
        return cls(answer_N, value_NxD, slope_NxD, f_NxF, W_dec_FxD, norm)

    def knows(self, swap: AnswerSwap) -> bool:
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

    def shuffled(self, rng: np.random.Generator) -> "AnswerTexts":
        """Return the same texts with their answers shuffled."""
        return dataclasses.replace(self, answer_N=rng.permutation(self.answer_N))


@dataclasses.dataclass(frozen=True)
class SteeringChange:
    """A change of one site: a vector is added, or features are set to values.

    Attributes:
      vector_D: the vector; None: features are set.
      features: the features.
      values: their activations, at every position.
    """

    vector_D: np.ndarray | None = None
    features: tuple[int, ...] = ()
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def edit(self, dictionary: Dictionary) -> Any:
        """Return the change at all positions as an edit for ``lm.generate`` and ``lm(...)``."""
        if self.vector_D is not None:
            return _basis(dictionary, [self.vector_D]).steer([0], 1.0)
        if not self.features:
            # Features as they are: an edit that changes nothing.
            return dictionary.scale([0], 1.0)
        return dictionary.set(list(self.features), self.values)


def strengths_of(method: str, doses: Sequence[float]) -> tuple[float, ...]:
    """Return the strengths of a method: factors of activations for ``clamp``, otherwise doses."""
    return FACTORS if method == "clamp" else tuple(doses)


def steering_change(
    texts: AnswerTexts, method: str, swap: AnswerSwap, features: Sequence[int], strength: float
) -> SteeringChange:
    """Return the change of a method.

    Args:
      texts: the texts that it is learned on.
      method: one of ``METHODS``.
      swap: the answers.
      features: the top features of the swap.
      strength: norm of what is added, in mean norms of the site's values; for ``clamp`` the factor of the features'
        mean activations on texts of the target answer.
    """
    chosen = list(features)
    if method == "clamp":
        level_K = texts.f_NxF[texts.answer_N == swap.target][:, chosen].mean(axis=0, dtype=np.float64)
        return SteeringChange(None, tuple(chosen), strength * level_K)
    if method == "add":
        vector_D = texts.mean_difference(texts.f_NxF[:, chosen], swap) @ texts.W_dec_FxD[chosen]
    else:
        vector_D = texts.mean_difference(texts.value_NxD, swap)
    return SteeringChange(strength * texts.norm * _unit(vector_D))


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
    """Return differences of means of texts whose answers were shuffled, of norm 1.

    Args:
      texts: the texts and their answers.
      swap: the answers whose means are compared.
      count: number of directions.
      seed: seed of the shuffles.
    """
    drawn = (texts.shuffled(np.random.default_rng([seed, number])) for number in range(count))
    return [_unit(each.mean_difference(each.value_NxD, swap)) for each in drawn]


class Steered(NamedTuple):
    """Readouts of S changes on P prompts, float64 [S, P].

    Attributes:
      diff_SxP: logit(answer) - logit(target).
      top1_SxP: 1 where the prompt's answer is the likeliest token.
      norm_SxP: norm of the change at the site, over all positions.
    """

    diff_SxP: np.ndarray
    top1_SxP: np.ndarray
    norm_SxP: np.ndarray


def steer(
    lm: LanguageModel,
    split: SplitModel,
    prompts: Sequence[Prompt],
    changes: Sequence[SteeringChange],
    batch_rows: int = BATCH_ROWS,
    on_progress: OnProgress = lambda done, total: None,
) -> Steered:
    """Run every change on every prompt.

    Args:
      lm: the model.
      split: the model, split at the dictionary's site.
      prompts: P prompts.
      changes: S changes.
      batch_rows: as for ``effects``.
      on_progress: called with the tokens done and in total; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    values_3xSxP = np.zeros((3, len(changes), len(prompts)))
    adds_S = np.array([change.vector_D is not None for change in changes])
    # Vectors and features are edits of different dictionaries, which are run one after the other.
    for places in (np.flatnonzero(adds_S), np.flatnonzero(~adds_S)):
        if not len(places):
            continue
        edits = make_edits(split.dictionary, [changes[s] for s in places.tolist()])
        # A vector is an edit of another basis at the same site.
        edited = SplitModel(lm, edits.dictionary) if adds_S[places[0]] else split
        runs = edited.run(prompts)
        edits = dataclasses.replace(edits, dictionary=edited.dictionary)
        measured = run_edits(edited, runs, edits, batch_rows, on_progress, readouts=True)
        values = [measured.ablated_SxP, measured.readouts["top1"][1], change_norms(edited, runs, edits)]
        values_3xSxP[:, places] = values
    return Steered(*values_3xSxP)


def make_edits(dictionary: Dictionary, changes: Sequence[SteeringChange]) -> FeatureEdits:
    """Return changes as batched edits.

    Args:
      dictionary: the dictionary at whose site changes act.
      changes: all of them add a vector, or all set features.
    """
    vectors = [change.vector_D for change in changes if change.vector_D is not None]
    if vectors:
        return add(_basis(dictionary, vectors), [[number] for number in range(len(vectors))], 1.0)
    sets = tuple(np.asarray(change.features, np.int64) for change in changes)
    return FeatureEdits(dictionary, sets, tuple(np.ones(len(s)) for s in sets), tuple(c.values for c in changes))


def rise_on_text(
    lm: LanguageModel, split: SplitModel, text: HeldOutText, changes: Sequence[SteeringChange]
) -> np.ndarray:
    """Return by how much each change, at all positions, raises the cross-entropy of documents, nats per token [S, N].

    Args:
      lm: the model.
      split: the model, split at the dictionary's site.
      text: N documents.
      changes: S changes of one kind, all with a vector or none.
    """
    edits = make_edits(split.dictionary, changes)
    edited = SplitModel(lm, edits.dictionary)
    diffs = text.effects(edited, dataclasses.replace(edits, dictionary=edited.dictionary))
    return diffs.rise_SxN / diffs.tokens_N


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


def _basis(dictionary: Dictionary, vectors: Sequence[np.ndarray]) -> Dictionary:
    """Return vectors as a basis at the site that a dictionary writes to, with its rule for attention sinks."""
    directions_FxD = jnp.asarray(np.stack(vectors), jnp.float32)
    count, width = directions_FxD.shape
    used = dictionary.config
    max_norm = used.target_max_norm if used.target else used.max_norm
    config = DictionaryConfig(
        kind="linear", site=used.target or used.site, d_in=width, n_features=count, max_norm=max_norm
    )
    zeros = dict(b_enc_F=jnp.zeros(count), b_dec_D=jnp.zeros(width))
    return Dictionary(config, W_enc_DxF=directions_FxD.T, W_dec_FxD=directions_FxD, **zeros)
