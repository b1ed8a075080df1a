"""What to change in order to turn one answer into another, learned on train texts.

A text is a train prompt, or its counterpart, to which the prompt's wrong answer is right; it is read at its last
position. A prompt is steered from its own answer c to that of its counterpart, w, by one of

- ``difference``: the mean value of texts whose answer is w less that of texts whose answer is c is added (Rimsky et
  al., 2024, arXiv 2312.06681);
- ``gradient``: likewise the slope of logit(w) - logit(c), which is the direction that acts most at the smallest doses;
- ``features``: likewise the mean change of the top features, which each adds its direction. The top ones have the
  largest change x that slope along their direction;
- ``clamp``: these features are held, wherever the prompt is changed, at a multiple of their mean on texts whose answer
  is w (Templeton et al., 2024).

What is added has a length of its own choosing, its *dose*, counted in mean lengths of the site's values.

Random directions are differences of means after the answers of the texts were shuffled: they lie where values of these
texts differ, so that they are harder to beat than directions of which most lead where no value ever is.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.interventions.slopes import leaders
from saejax.interventions.split_model import CleanRun, SiteRows, SplitModel, slices
from saejax.models import decoder
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.tasks.behaviours import Prompt

LEAST = 3  # texts of an answer, of which there is a mean


class Turn(NamedTuple):
    """From one answer to another: token ids."""

    own: int
    target: int


@dataclasses.dataclass(frozen=True)
class AnswerTexts:
    """N texts at their last positions.

    Attributes:
      answer_N: token ids of their right answers.
      value_NxD: of the site.
      slope_NxD: of logit(right) - logit(wrong).
      f_NxF: activations.
      W_dec_FxD: the features' directions.
      length: mean length of the site's values wherever they may be changed.
    """

    answer_N: np.ndarray
    value_NxD: np.ndarray
    slope_NxD: np.ndarray
    f_NxF: np.ndarray
    W_dec_FxD: np.ndarray
    length: float

    @classmethod
    def of(cls, split: SplitModel, prompts: Sequence[Prompt]) -> "AnswerTexts":
        """The texts of train prompts."""
        turned = [
            dataclasses.replace(p, text=p.counterpart, correct=p.wrong, wrong=p.correct, counterpart=p.text)
            for p in prompts
            if p.counterpart
        ]
        parts, lengths = [], []
        for run in split.run([*prompts, *turned]):
            count = len(run.index_P)
            value_BxD, read_BxD = last_values(run.value_BxTxD, run), last_values(run.read_BxTxD, run)
            f_BxF = np.asarray(split.dictionary.encode(jnp.asarray(read_BxD)))
            parts.append([a[:count] for a in (run.answers_Bx2[:, 0], value_BxD, _slopes(split, run), f_BxF)])
            domain_PxT = np.asarray(run.domain_BxT)[:count]
            lengths.append(np.linalg.norm(np.asarray(run.value_BxTxD, np.float64)[:count][domain_PxT], axis=1))
        answer_N, value_NxD, slope_NxD, f_NxF = (np.concatenate(part) for part in zip(*parts, strict=True))
        every = np.concatenate(lengths)
        W_dec_FxD = np.asarray(split.dictionary.W_dec_FxD[...], np.float32)
        return cls(answer_N, value_NxD, slope_NxD, f_NxF, W_dec_FxD, float(every.mean()) if len(every) else 0.0)

    def known(self, turn: Turn) -> bool:
        """Whether there are enough texts of both answers."""
        return all((self.answer_N == answer).sum() >= LEAST for answer in turn)

    def between(self, method: str, turns: Sequence[Turn]) -> np.ndarray:
        """The directions of ``difference`` or ``gradient``, of length 1 or 0, fp64 [R, D]."""
        values_NxD = self.value_NxD if method == "difference" else self.slope_NxD
        return unit([self._apart(values_NxD, turn) for turn in turns])

    def top(self, turn: Turn, count: int) -> list[int]:
        """The features that ``features`` and ``clamp`` use, best first; at most so many."""
        slope_D = self._apart(self.slope_NxD, turn) / 2  # texts of either answer see it from their own side
        return leaders(self._apart(self.f_NxF, turn) * (self.W_dec_FxD @ slope_D), count)

    def of_features(self, turns: Sequence[Turn], tops: Sequence[Sequence[int]]) -> np.ndarray:
        """The directions of ``features``, given the top ones of each turn; of length 1 or 0, fp64 [R, D]."""
        chosen = [list(top) for top in tops]
        rows = zip(turns, chosen, strict=True)
        return unit([self._apart(self.f_NxF[:, top], turn) @ self.W_dec_FxD[top] for turn, top in rows])

    def level(self, turn: Turn, features: Sequence[int]) -> np.ndarray:
        """Mean activations of features on texts whose answer is the target, [K]."""
        return self.f_NxF[self.answer_N == turn.target][:, list(features)].mean(axis=0)

    def shuffled(self, rng: np.random.Generator) -> "AnswerTexts":
        """The same texts with their answers dealt anew."""
        return dataclasses.replace(self, answer_N=rng.permutation(self.answer_N))

    def _apart(self, values_Nx: np.ndarray, turn: Turn) -> np.ndarray:
        own, target = (values_Nx[self.answer_N == a].mean(axis=0, dtype=np.float64) for a in turn)
        return target - own


def unit(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of length 1, or 0 where they have none."""
    rows_RxD = np.asarray(rows, np.float64)
    length_Rx1 = np.linalg.norm(rows_RxD, axis=1, keepdims=True)
    return np.divide(rows_RxD, length_Rx1, out=np.zeros_like(rows_RxD), where=length_Rx1 > 0)


def last_values(values_BxTxD: jax.Array, run: CleanRun) -> np.ndarray:
    """Values of a clean run at its prompts' last positions, fp32 [B, D]."""
    return np.asarray(values_BxTxD[np.arange(len(run.last_B)), run.last_B], np.float32)


def _slopes(split: SplitModel, run: CleanRun) -> np.ndarray:
    """The slope of each prompt's logit difference in the site's last value, [B, D]."""
    rows = (split.placed(run.rows(own)) for own in slices(run))
    return np.concatenate([np.asarray(last_slope(split.point, split.params, some), np.float32) for some in rows])


@functools.partial(jax.jit, static_argnums=0)
def last_slope(point: SplitPoint, params: decoder.Params, rows: SiteRows) -> jax.Array:
    """The program of the slopes of prompts' logit differences: in the ``rows``' last values, [B, D]."""

    def difference(value_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = point.run_suffix(params, rows.stream_BxTxD, value_BxTxD)
        return point.logit_difference(params, x_BxTxD, rows.last_B, rows.answers_Bx2).sum()

    slope_BxTxD = jax.grad(difference)(rows.value_BxTxD)
    last_BxD = jnp.take_along_axis(slope_BxTxD, rows.last_B[:, None, None], axis=1)[:, 0]
    return jax.lax.with_sharding_constraint(last_BxD, sharding(point.mesh))
