"""Intervals over prompts that share templates: prompts made from one template are not independent."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.results import Interval
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import middle, wilson

_ROUNDING = 1e-12  # of the variance of a share


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Bootstrap samples of P prompts, by template where they have several: the same for all that is measured on them.

    Attributes:
      template_P: of each prompt.
      resamples: how many.
      seed: of the samples.
      share_RxP: how much of the mean each prompt makes up in each; see ``resampled_shares``.
    """

    template_P: np.ndarray
    resamples: int
    seed: int
    share_RxP: np.ndarray

    @classmethod
    def of(cls, templates: Sequence[str] | np.ndarray, resamples: int, seed: int) -> "Resampling":
        """The samples of prompts with these templates."""
        template_P = np.asarray(templates)
        return cls(template_P, resamples, seed, resampled_shares(template_P, resamples, seed))

    @property
    def templates(self) -> int:
        """How many templates the intervals resample; 0 where prompts are resampled one by one."""
        count = len(np.unique(self.template_P))
        return count if 1 < count < len(self.template_P) else 0

    def among(self, own_P: np.ndarray) -> "Resampling":
        """That of some of the prompts, bool [P]."""
        return self if own_P.all() else Resampling.of(self.template_P[own_P], self.resamples, self.seed)

    def mean(self, values_P: np.ndarray) -> Interval:
        """The mean over prompts and its 95 % bootstrap interval."""
        values_P = np.asarray(values_P, np.float64)
        return middle(self.share_RxP @ values_P, float(values_P.mean()))

    def share(self, right_P: np.ndarray) -> Interval:
        """The share of prompts of which something is true, and its 95 % Wilson interval.

        With several templates the prompts are worth fewer: as many as would let the share vary as much as it does
        between the bootstrap samples (the effective sample size of Kish, 1965); where it does not vary, what they are.
        """
        right_P = np.asarray(right_P, np.float64)
        variance = float((self.share_RxP @ right_P).var()) if self.templates else 0.0
        share, prompts = right_P.mean(), len(right_P)
        worth = share * (1 - share) / variance if variance > _ROUNDING else prompts
        return wilson(right_P, min(max(worth, 1.0), prompts))


def of_prompts(prompts: Sequence[Prompt], resamples: int, seed: int) -> Resampling:
    """As ``Resampling.of`` the prompts' templates."""
    return Resampling.of([prompt.template for prompt in prompts], resamples, seed)


def resampled_shares(template_P: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How much of the mean each prompt makes up in each bootstrap sample of templates, and of prompts within them.

    Templates are drawn with replacement, then of each drawn one as many prompts as it has. Where every prompt has a
    template of its own, or all have the same one, this is the ordinary bootstrap over prompts.

    Args:
      template_P: a label for each prompt.
      resamples, seed: how many samples, and of their draw.

    Returns:
      [R, P]; rows sum to 1.
    """
    rng = np.random.default_rng(seed)
    labels, template_P = np.unique(template_P, return_inverse=True)
    size_G = np.bincount(template_P)
    drawn_RxG = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=resamples)
    count_RxP = np.empty((resamples, len(template_P)))
    for group, size in enumerate(size_G):
        inside_RxQ = rng.multinomial(size * drawn_RxG[:, group], np.full(size, 1 / size))
        count_RxP[:, template_P == group] = inside_RxQ
    return count_RxP / count_RxP.sum(axis=1, keepdims=True)
