"""Rows of joined sites, which crosscoders are trained and scored on, from rows of their parts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from saejax.activations.batches import RowRange
from saejax.activations.results import SinkCounts
from saejax.errors import UserError
from saejax.models.sites import is_joined, site_parts

_SAMPLE = 65_536  # rows from which scales are estimated
_Rows = TypeVar("_Rows")  # a ``Store`` or a ``ModelStream``


def single_sites(sites: Iterable[str]) -> list[str]:
    """Return the distinct single sites that have to be captured for these."""
    return list(dict.fromkeys(part for site in sites for part in site_parts(site)))


def with_joined(rows: _Rows, sites: Sequence[str], scales: Mapping[str, Sequence[float]] | None = None) -> _Rows:
    """Return a store, or a stream with its first buffer made, that also has the joined sites among ``sites``.

    These are scaled as ``scales`` say; None: so that all their parts get one mean norm, estimated on training rows.
    """
    names = [site for site in dict.fromkeys(sites) if is_joined(site)]
    return cast(_Rows, JoinedRows(rows, names, scales)) if names else rows


class JoinedRows:
    """A store or a stream with joined sites beside its own. A row is left out where it is a sink at any part.

    Args:
      rows, scales: as for ``with_joined``.
      names: the joined sites.

    Attributes:
      sites: all that can be read.
      scales: scales of each joined site's parts.
    """

    def __init__(self, rows: Any, names: Sequence[str], scales: Mapping[str, Sequence[float]] | None = None):
        self._rows, self.sites = rows, (*rows.sites, *names)
        self.scales = {name: tuple(scales[name] if scales else self._estimate_scales(name)) for name in names}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values: scaled ones would lose what bfloat16 leaves of them a second time."""
        return np.dtype(np.float32)

    def d(self, site: str) -> int:
        """Return the width of a site, or of all parts of a joined one."""
        return sum(map(self._rows.d, site_parts(site)))

    def max_norm(self, site: str) -> float:
        """Return the sink rule of a site; a joined site has only its parts' rules."""
        # A joined value has no norm that a rule could compare: its parts were compared.
        return 3.4e38 if is_joined(site) else self._rows.max_norm(site)

    def sinks(self, site: str) -> SinkCounts:
        """Return what the sink rule drops; for a joined site, at the part that has the most sinks."""
        return max(map(self._rows.sinks, site_parts(site)), key=lambda counts: counts.position_0 + counts.beyond)

    def usable(self, split: str, *sites: str) -> RowRange:
        """Return the rows of a split that are sinks at none of the sites and parts."""
        return self._rows.usable(split, *single_sites(sites))

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Return the same rows as an array."""
        return self._rows.rows(split, *single_sites(sites))

    def read(self, site: str, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the vectors [n, d] of rows, fp32, of a joined site its parts scaled and side by side."""
        return self._join(site, {part: self._rows.read(part, rows) for part in site_parts(site)}, out)

    def held_out(self, count: int, *sites: str) -> dict[str, np.ndarray]:
        """Return such vectors of at most ``count`` held-out rows, see ``Store.held_out``."""
        values = self._rows.held_out(count, *single_sites(sites))
        return {site: self._join(site, values) for site in sites}

    def mean(self, site: str, *sites: str) -> np.ndarray:
        """Return the mean of such vectors, float64 [d], see ``Store.mean``."""
        sink_sites = single_sites([site, *sites])
        means = [self._rows.mean(part, *sink_sites) * factor for part, factor in self._parts(site)]
        return np.concatenate(means)

    def part_facts(self, site: str) -> dict[str, tuple[float, ...]]:
        """Return scales and sink rules of a joined site's parts, as fields of ``SiteScale``; empty for others."""
        if not is_joined(site):
            return {}
        return dict(scales=self.scales[site], max_norms=tuple(map(self._rows.max_norm, site_parts(site))))

    def _join(self, site: str, values: Mapping[str, np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
        """Return the scaled vectors of a site, given its parts' vectors by name."""
        scaled = [values[part].astype(np.float32) * factor for part, factor in self._parts(site)]
        return np.concatenate(scaled, axis=1, out=out)

    def _parts(self, site: str) -> Iterator[tuple[str, np.float32]]:
        """Return the parts of a site with their factors."""
        return zip(site_parts(site), map(np.float32, self.scales.get(site, (1.0,))), strict=True)

    def _estimate_scales(self, name: str) -> list[float]:
        """Estimate the scales that bring all parts of a joined site to one mean norm."""
        parts = site_parts(name)
        rows = self._rows.rows("train", *parts)
        if not len(rows):
            raise UserError(
                f"every training token is an attention sink at one of {', '.join(parts)}: raise --capture.sink_factor, "
                "or capture other sites"
            )
        # Spread over all rows: the first ones are of few documents.
        sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(np.int64)]
        # The mean norm that training scales inputs to, for a part of the mean width.
        size, scales = np.sqrt(self.d(name) / len(parts)), []
        for part in parts:
            # Rounded here, so that the scale that is saved is the one that is multiplied with.
            scales.append(float(np.float32(size / mean_norm(part, self._rows.read(part, sample)))))
        return scales


def mean_norm(site: str, acts_NxD: np.ndarray) -> float:
    """Return the mean norm of values at a site, in float64.

    Args:
      site: the site, for the message.
      acts_NxD: values of N tokens.

    Raises:
      UserError: all values are zero.
    """
    norm = float(np.linalg.norm(acts_NxD.astype(np.float64), axis=1).mean())
    if norm == 0:
        raise UserError(
            f"all activations at {site} are zero: nothing can be learned from this store; check the model's weights, "
            "or capture another site"
        )
    return norm
