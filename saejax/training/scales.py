"""What the trainer knows of the activations before it starts: their scale, and where the decoder's bias begins."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from saejax.activations.batches import Parts, sites_of
from saejax.activations.joined import JoinedRows
from saejax.activations.manifest import CapturedModel
from saejax.dictionaries import losses
from saejax.errors import UserError
from saejax.settings import TrainConfig
from saejax.training.members import Member, SiteScale

_SAMPLE = 65_536  # rows from which something is estimated


class ScaledRows(Protocol):
    """What is known of the activations before training: a ``Store``, a ``ModelStream``, or what stands for one."""

    @property
    def sites(self) -> Sequence[str]:
        """Those that there are."""
        ...

    @property
    def model(self) -> CapturedModel:
        """Whose activations they are."""
        ...

    def d(self, site: str) -> int:
        """Width of a site."""
        ...

    def max_norm(self, site: str) -> float:
        """The sink rule: rows with a larger norm are attention sinks."""
        ...

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Rows of a split that are sinks at none of the sites, ascending."""
        ...

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """The vectors [n, d] at a ``site``, of ``rows``."""
        ...


def sampled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Some of the rows, ascending: all that there are where they are few.

    Args:
      rows: numbers of rows, ascending.
      seed: of the draw.
    """
    if len(rows) <= _SAMPLE:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, _SAMPLE, replace=False))


def site_scales(store: ScaledRows, config: TrainConfig, stack: Sequence[Member], parts: Parts) -> list[SiteScale]:
    """For each member, the factors that bring its activations to a mean norm of sqrt(d), and its first bias.

    Estimated from a sample of the store's training rows, or from the first buffer of a stream.
    """
    rows = sampled(store.rows("train", *sites_of(parts)), config.seed[0])
    factor, bias, metric = {}, {}, {}
    for site in sites_of(parts):
        acts_NxD = store.read(site, rows).astype(np.float64)
        norm = float(np.linalg.norm(acts_NxD, axis=1).mean())
        if norm == 0:
            raise UserError(f"all activations at {site} are zero: nothing can be learned from this store")
        factor[site] = math.sqrt(acts_NxD.shape[1]) / norm
        if any(site == member.target for member in stack):
            bias[site] = _initial_bias(config.initial_bias, acts_NxD)
            if config.whiten_error:
                metric[site] = losses.whitening(acts_NxD, config.whiten_error)
    return [
        SiteScale(
            factor[m.site],
            factor[m.target],
            bias[m.target],
            store.max_norm(m.site),
            metric_DxD=metric.get(m.target),
            target_max_norm=store.max_norm(m.target),
            **(store.part_facts(m.site) if isinstance(store, JoinedRows) else {}),
        )
        for m in stack
    ]


def _initial_bias(kind: str, acts_NxD: np.ndarray) -> np.ndarray:
    if kind == "zero":
        return np.zeros(acts_NxD.shape[1])
    mean_D = acts_NxD.mean(0)
    return mean_D if kind == "mean" else geometric_median(acts_NxD, mean_D)


def geometric_median(acts_NxD: np.ndarray, start_D: np.ndarray, rounds: int = 50) -> np.ndarray:
    """The point with the smallest sum of distances to all rows of ``acts``, by Weiszfeld's iteration.

    Args:
      acts_NxD: the rows.
      start_D: where it starts.
      rounds: at most; it ends where a round moves the point by less than a millionth of its length.
    """
    point_D = start_D
    for _ in range(rounds):
        distance_N = np.maximum(np.linalg.norm(acts_NxD - point_D, axis=1), 1e-12)
        moved_D = (acts_NxD / distance_N[:, None]).sum(0) / (1 / distance_N).sum()
        if np.linalg.norm(moved_D - point_D) <= 1e-6 * np.linalg.norm(point_D):
            return moved_D
        point_D = moved_D
    return point_D
