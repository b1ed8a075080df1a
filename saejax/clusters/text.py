"""What features do on text: that of the store, if the dictionaries were trained on one, or else read anew."""

from collections.abc import Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.parallel.mesh import make_mesh
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.cluster import ClusterConfig
from saejax.transfer.activity import Activity, encode
from saejax.transfer.compared import Compared
from saejax.transfer.reading import SitesOnText, read_sites


class ClusterText:
    """The text and who reads it."""

    def __init__(self, run: Run, compared: Sequence[Compared]):
        self._config = run.configs[ClusterConfig]
        self._store = Store.open(run.inputs["capture"]) if "capture" in run.inputs else None
        unstored = [one for one in compared if not self._stored(one)]
        about = self._config.tokens, self._config.batch_tokens, self._config.seed
        self._read = read_sites(run, unstored, make_mesh(run.configs[MeshConfig]), *about) if unstored else None

    def _stored(self, one: Compared) -> bool:
        own = self._store and self._store.model.fingerprint == one.fingerprint
        return bool(own and self._store and one.dictionary.site in self._store.sites)

    def of(self, one: Compared) -> tuple[Activity, np.ndarray]:
        """The activity of a dictionary, and the document of each token."""
        dictionary, batch = one.dictionary, self._config.batch_tokens
        if not self._stored(one):
            assert isinstance(self._read, SitesOnText)
            read = self._read.reads[one.fingerprint]
            dictionary = dictionary.with_sink_norms(self._read.lms[one.fingerprint].sink_norm)
            return encode(dictionary, self._read.values[one.fingerprint, dictionary.site], batch), read.text_N
        assert self._store
        dictionary = dictionary.with_sink_norms(self._store.max_norm)
        rows = self._store.rows("train", dictionary.site)
        document_N = self._store.tokens(rows)[0]
        known, place_N, count = np.unique(document_N, return_inverse=True, return_counts=True)
        order = np.random.default_rng(self._config.seed).permutation(len(known))
        taken = np.zeros(len(known), bool)
        taken[order[: int(np.searchsorted(np.cumsum(count[order]), self._config.tokens)) + 1]] = True
        kept = taken[place_N]
        values_NxD = np.asarray(self._store.read(dictionary.site, rows[kept]), np.float32)
        return encode(dictionary, values_NxD, batch), document_N[kept]
