"""Stored activations for analyses: float arrays by rows, and rows by tokens, documents and splits."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.activations.store import Store
from saejax.errors import UserError, file_errors
from saejax.links import resolve_links


class SiteActivations:
    """The values at a site, read where they are indexed as a numpy array [rows, d] is along its first axis.

    Attributes:
      shape: number of rows, one a token, and the width d.
      dtype: float32, whatever the store keeps.
    """

    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, store: Store, site: str):
        self._store, self._site = store, site
        self.shape = store.manifest.rows, store.d(site)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Return the values of rows: a number gives [d]; a slice, numbers or a mask of all rows give [n, d]."""
        rows, *columns = rows if isinstance(rows, tuple) else (rows,)
        # Numpy itself says which rows an index means: whatever it takes is taken here.
        try:
            chosen = np.arange(len(self))[rows]
        except IndexError as error:
            raise IndexError(f"{self._site}: {error}; there are rows 0 to {len(self) - 1}") from None
        values_NxD = self._store.read(self._site, np.ravel(chosen)).astype(np.float32)
        return values_NxD.reshape(*np.shape(chosen), self.shape[1])[(..., *columns)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{self._site}: {self.shape[0]:,} rows of {self.shape[1]} float32 values; read by [rows]>"


class StoredActivations(Mapping[str, SiteActivations]):
    """A store as a mapping from sites to their values; row r of every site is the same token.

    Attributes:
      store: the store itself.
      document_N: int32 number of each row's document, [rows].
      position_N: int32 position of each row's token in its document, from 0.
      token_N: int32 token id of each row.
    """

    def __init__(self, store: Store):
        self.store = store
        self.document_N, self.position_N, self.token_N = store.tokens(np.arange(store.manifest.rows))

    def __getitem__(self, site: str) -> SiteActivations:
        """Return the values at a site; a ``UserError`` if the store has no such site."""
        return SiteActivations(self.store, self.store._check_site(site))

    def __iter__(self) -> Iterator[str]:
        return iter(self.store.sites)

    def __len__(self) -> int:
        return len(self.store.sites)

    def __repr__(self) -> str:
        return f"<store {self.store.folder}: {len(self.token_N):,} rows at {', '.join(self)}>"

    def rows(
        self,
        *,
        tokens: Sequence[int] | int | None = None,
        documents: Sequence[int] | int | None = None,
        split: str = "",
        without_sinks: Sequence[str] | str = (),
    ) -> np.ndarray:
        """Return the rows that fit all of what is given, int64 [n], by document and position.

        Args:
          tokens: token ids; None: any.
          documents: numbers of documents; None: any.
          split: "train" or "held_out"; "": both.
          without_sinks: sites at which rows must be no attention sinks.

        Raises:
          UserError: there is no such split or site.
        """
        sites = [without_sinks] if isinstance(without_sinks, str) else without_sinks
        kept_N = np.zeros(len(self.token_N), bool)
        for name in [split] if split else ["train", "held_out"]:
            kept_N[self.store.rows(name, *sites)] = True
        # Numbers or one number, as for rows themselves.
        for wanted, column_N in ((tokens, self.token_N), (documents, self.document_N)):
            if wanted is not None:
                kept_N &= np.isin(column_N, np.ravel(wanted))
        # Rows of a shard stand in random order, and a text is read in its own.
        chosen = np.flatnonzero(kept_N)
        return chosen[np.lexsort((self.position_N[chosen], self.document_N[chosen]))]


@file_errors()
def open_store(folder: str | Path) -> StoredActivations:
    """Open the activations that the stage ``capture`` or ``Activations.save`` has stored.

    Args:
      folder: such as "runs/mine/capture".

    Returns:
      A mapping from sites to values: ``open_store(FOLDER)["resid_post.15"][:100]`` is fp32 [100, d].

    Raises:
      UserError: there is no finished store, or it is damaged.
    """
    if not isinstance(folder, str | Path):
        raise UserError(f"folder is a {type(folder).__name__}: expected the folder of a store")
    return StoredActivations(Store.open(resolve_links(folder)))
