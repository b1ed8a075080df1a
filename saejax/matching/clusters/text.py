"""Activations of features on text: the store's, if the dictionaries were trained on one, or text that is read anew."""

from collections.abc import Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.matching.transfer.activity import Activity, encode
from saejax.matching.transfer.compared import Compared
from saejax.matching.transfer.reading import SharedText, read_shared_text
from saejax.parallel.mesh import make_mesh
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.cluster import ClusterConfig


class ClusterText:
    """The text of the stage ``cluster``.

    Args:
      run: the run.
      compared: the dictionaries.
    """

    def __init__(self, run: Run, compared: Sequence[Compared]):
        self._config = run.configs[ClusterConfig]
        self._store = Store.open(run.inputs["capture"]) if "capture" in run.inputs else None
        self._unstored = [each for each in compared if not self._is_stored(each)]
        settings = self._config.tokens, self._config.batch_tokens, self._config.seed
        self._shared: SharedText | None = None
        if self._unstored:
            self._shared = read_shared_text(run, self._unstored, make_mesh(run.configs[MeshConfig]), *settings)

    def _is_stored(self, each: Compared) -> bool:
        if not self._store or self._store.model.fingerprint != each.fingerprint:
            return False
        return each.config.site in self._store.sites

    def of(self, each: Compared) -> tuple[Activity, np.ndarray]:
        """Return the activity of a dictionary, and the document of each token."""
        if not self._is_stored(each):
            assert self._shared
            return self._shared.activity(self._unstored.index(each)), self._shared.reads[each.fingerprint].text_N
        assert self._store
        dictionary = each.dictionary.with_sink_norms(self._store.max_norm)
        rows = self._store.rows("train", dictionary.site)
        document_N = self._store.tokens(rows)[0]
        documents, index_N, count = np.unique(document_N, return_inverse=True, return_counts=True)
        # Whole documents at random, as documents are what the bootstrap resamples.
        order = np.random.default_rng(self._config.seed).permutation(len(documents))
        taken = np.zeros(len(documents), bool)
        taken[order[: int(np.searchsorted(np.cumsum(count[order]), self._config.tokens)) + 1]] = True
        kept_N = taken[index_N]
        values_NxD = np.asarray(self._store.read(dictionary.site, rows[kept_N]), np.float32)
        return encode(dictionary, values_NxD, self._config.batch_tokens), document_N[kept_N]
