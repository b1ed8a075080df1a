"""The rows of a store that dictionaries are scored on, in blocks."""

from collections.abc import Iterator, Sequence

import numpy as np

from saejax.activations.store import Store


def blocks(store: Store, split: str, sites: Sequence[str], size: int) -> Iterator[list[np.ndarray]]:
    """Yield blocks of activations at the distinct sites, with the same tokens row by row and without sinks of any site.

    Args:
      store: the activation store.
      split: "train" or "held_out".
      sites: names of the sites.
      size: maximum number of rows of a block.
    """
    sites = list(dict.fromkeys(sites))
    rows = store.rows(split, *sites)
    for start in range(0, len(rows), size):
        yield [store.read(site, rows[start : start + size]) for site in sites]
