"""Estimates from activations before training: their scale, the decoder bias to start from, the whitening matrix."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from saejax.activations.joined import JoinedRows, mean_norm
from saejax.activations.manifest import CapturedModel
from saejax.dictionaries import losses
from saejax.dictionaries.cross_layer import FORMS
from saejax.errors import UserError
from saejax.training.settings import TrainConfig

HELD_OUT_TOKENS = 8192  # on which members are scored while they are trained: a thousandth of explained variance
_SAMPLE = 65_536  # rows from which something is estimated


@dataclasses.dataclass(frozen=True)
class SiteScale:
    """Scales and norm limits of the activations that a member reads and predicts."""

    input: float  #: factor that brings inputs to a mean norm of sqrt(d)
    output: float  #: the same for targets
    bias_D: np.ndarray  #: where the decoder's bias starts, in raw units
    #: max_norm and target_max_norm: norms of an input and a target above which it is an attention sink, in raw units.
    max_norm: float | None = None
    target_max_norm: float | None = None
    #: matrix that errors are multiplied with before they are squared; None: the identity.
    metric_DxD: np.ndarray | None = None
    #: scales and max_norms: of the parts of a joined site, as in ``DictionaryConfig``; (): one site.
    scales: tuple[float, ...] = ()
    max_norms: tuple[float, ...] = ()


class ScaledRows(Protocol):
    """Activations as training reads them beforehand: a ``Store``, a ``ModelStream``, or a synthetic world's vectors."""

    @property
    def sites(self) -> Sequence[str]:
        """Sites that can be read."""

    @property
    def model(self) -> CapturedModel:
        """The model."""

    def d(self, site: str) -> int:
        """Return the width of a site."""

    def max_norm(self, site: str) -> float:
        """Return the sink rule: rows with a larger norm are attention sinks."""

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Return the rows of a split that are sinks at none of the sites, ascending."""

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the vectors [n, d] of rows at a site."""

    def held_out(self, count: int, *sites: str) -> dict[str, np.ndarray]:
        """Return the vectors [n, d] of at most ``count`` held-out tokens at the sites, sinks left out."""


def sample_rows(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """Return at most 65,536 of the row numbers ``rows_N``, ascending, drawn by ``seed``."""
    # Ascending, so that the store's files are read from front to back.
    if len(rows_N) <= _SAMPLE:
        return rows_N
    return np.sort(np.random.default_rng(seed).choice(rows_N, _SAMPLE, replace=False))


def estimate_scales(rows: ScaledRows, config: TrainConfig, pairs: Sequence[tuple[str, str]]) -> list[SiteScale]:
    """Return the scale of each (input, target) pair of sites, which depends on no other pair.

    The layers of a cross-layer transcoder are one dictionary, of tokens that are sinks at none of them.

    Args:
      rows: a store, whose training rows are sampled; or a stream, whose first buffer is.
      config: the settings.
      pairs: each member's pair.

    Raises:
      UserError: all activations of a site are zero, or are the same where errors are to be whitened.
    """
    every = tuple(dict.fromkeys(site for column in zip(*pairs, strict=True) for site in column))
    sample_of = functools.cache(lambda sites: sample_rows(rows.rows("train", *sites), config.seed[0]))
    by_pair = {}
    for pair in dict.fromkeys(pairs):
        by_pair[pair] = _estimate_scale(rows, config, pair, sample_of(every if config.form in FORMS else pair))
    return [by_pair[pair] for pair in pairs]


def _estimate_scale(rows: ScaledRows, config: TrainConfig, pair: tuple[str, str], rows_N: np.ndarray) -> SiteScale:
    """Return the scale of an (input, target) pair of sites, estimated on these rows."""
    site, target = pair
    factor = {}
    for name in dict.fromkeys(pair):
        # In float64: sums over 65,536 rows of large activations lose digits in float32.
        acts_NxD = rows.read(name, rows_N).astype(np.float64)
        factor[name] = math.sqrt(acts_NxD.shape[1]) / mean_norm(name, acts_NxD)
    bias_D, metric_DxD = acts_NxD.mean(0), None  # of the target, which comes last
    if config.whiten_error:
        if not np.ptp(acts_NxD, axis=0).any():
            raise UserError(
                f"all activations at {target} are the same: they have no covariance for "
                f"--train.whiten_error={config.whiten_error:g}; leave it out"
            )
        metric_DxD = losses.whitening(acts_NxD, config.whiten_error)
    return SiteScale(
        factor[site],
        factor[target],
        bias_D,
        rows.max_norm(site),
        target_max_norm=rows.max_norm(target),
        metric_DxD=metric_DxD,
        **(rows.part_facts(site) if isinstance(rows, JoinedRows) else {}),
    )
