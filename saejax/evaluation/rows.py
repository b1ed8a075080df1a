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
