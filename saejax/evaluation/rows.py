"""The rows of a store that dictionaries are scored on, in blocks."""

from collections.abc import Iterator, Sequence

import numpy as np

from saejax.activations.store import Store


def blocks(store: Store, split: str, sites: Sequence[str], size: int) -> Iterator[list[np.ndarray]]:
    """Activations of the sites, each named once, row by row the same tokens; those that are sinks at one left out.

    Args:
      split: "train" or "held_out".
      size: most rows of a block.
    """
    sites = list(dict.fromkeys(sites))
    rows = store.rows(split, *sites)
    for start in range(0, len(rows), size):
        yield [store.read(site, rows[start : start + size]) for site in sites]


def target_mean(store: Store, sites: Sequence[str], size: int) -> np.ndarray:
    """Mean of the target over training tokens, fp64 [d]."""
    total_D, count = np.zeros(store.d(sites[-1])), 0
    for *_, y_NxD in blocks(store, "train", sites, size):
        total_D += y_NxD.astype(np.float64).sum(0)
        count += len(y_NxD)
    return total_D / max(count, 1)
