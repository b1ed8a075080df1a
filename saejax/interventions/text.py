"""Held-out text, which has nothing to do with a behaviour, under edits: cross-entropy and divergence.

The text is held-out documents of the corpus, of which the first tokens are read. Edits act at all positions but
attention sinks. Where a counterpart's activations replace others, text has none, and they are set to zero.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.evaluation import programs
from saejax.interventions.edits import ZERO, FeatureEdits
from saejax.interventions.rows import edit_value, gather
from saejax.interventions.split_model import SplitModel, fit_ids, read_site
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.split import SplitPoint
from saejax.models.tokens import pad
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import sharding
from saejax.tasks import corpora
from saejax.tasks.settings import CorpusConfig, TaskConfig

LENGTH = 64  # tokens of a document
_AT_ONCE = 4  # documents of a program


class DocumentBatch(NamedTuple):
    """A few documents without an edit. Rows beyond ``documents`` are padding."""

    ids_BxT: jax.Array  #: token ids
    lengths_B: jax.Array  #: tokens of each document
    documents: int  #: how many they are
    sites: tuple[jax.Array, jax.Array, jax.Array]  #: stream, value and what is read at the site, [B, T, D] each
    end_BxTxD: jax.Array  #: the stream leaving the last layer


class HeldOutText:
    """Documents on which edits are run.

    Args:
      documents: token ids, at least 2 of each.
    """

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.documents = [list(document) for document in documents]
        self._clean: tuple[SplitPoint, decoder.Params, list[DocumentBatch]] | None = None

    @classmethod
    def of(
        cls, corpus: CorpusConfig, task: TaskConfig, model: LanguageModel, count: int, length: int = LENGTH
    ) -> "HeldOutText | None":
        """Return documents of the corpus, evenly spread over those that are held out; None if there are none.

        Args:
          corpus: settings of the corpus that the text comes from.
          task: settings of the tasks, likewise.
          model: the model whose tokenizer is used.
          count: number of documents; 0: None is returned.
          length: maximum number of tokens of each.

        Raises:
          UserError: the corpus cannot be read, or not be split.
        """
        if not count:
            return None
        held_out = corpora.held_out_documents(corpus, task)
        # Evenly spread, as neighbours in a corpus are often of one source.
        chosen = [held_out[place] for place in np.unique(np.arange(count) * len(held_out) // count)]
        length = min(length, model.config.context)
        # Cut before it is split: long documents would otherwise be split into tokens as a whole.
        ids = [model.encode(document.text[: 16 * length])[:length] for document in chosen]
        read = [document for document in ids if len(document) > 1]
        return cls(read) if read else None

    def effects(self, split: SplitModel, edits: FeatureEdits) -> dict[str, np.ndarray]:
        """Return the effects of S edits on N documents.

        Args:
          split: the model, split at the site that the edits' dictionary writes to.
          edits: edits of the split's dictionary.

        Returns:
          Cross-entropy ``ce`` and KL(clean || edited) ``kl``, float64 ``[1 + S, N]``: without an edit, then with each;
          means over the predicted tokens, nats per token.
        """
        # All dictionaries and bases of a site are compared on one clean run, which takes longer than an edit does.
        if self._clean is None or self._clean[0] != split.point or self._clean[1] is not split.params:
            starts = range(0, len(self.documents), _AT_ONCE)
            batches = [self._run_clean(split, self.documents[first : first + _AT_ONCE]) for first in starts]
            self._clean = split.point, split.params, batches
        parts = [_run_edits(split, edits, batch) for batch in self._clean[2]]
        ce_ExN, kl_ExN = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        tokens_N = np.array([len(document) - 1 for document in self.documents])
        return dict(ce=ce_ExN / tokens_N, kl=kl_ExN / tokens_N)

    def _run_clean(self, split: SplitModel, documents: Sequence[Sequence[int]]) -> DocumentBatch:
        padded = pad([*documents, *[[0, 0]] * (_AT_ONCE - len(documents))])
        # All batches have the length of the longest document: one shape, so that each program is compiled once.
        ids_BxT = fit_ids(padded.ids_BxT, round_length(max(map(len, self.documents))))
        ids, lengths = split.by_row(ids_BxT, padded.lengths_B)
        sites = _run_prefix(split.point, split.params, ids)
        # By the program that runs edits, so that an edit that changes nothing has no effect to the last bit.
        end_BxTxD = programs.tail(split.point, split.params, *sites[:2])
        return DocumentBatch(ids, lengths, len(documents), sites, end_BxTxD)


def _run_edits(split: SplitModel, edits: FeatureEdits, batch: DocumentBatch) -> list[np.ndarray]:
    """Return the cross-entropy and divergence of a few documents, sums [1 + S, N]: the clean ones, then the edited."""
    point, every_BxT = split.point, np.ones(batch.ids_BxT.shape, bool)
    stream, value, read, domain_BxT, _ = read_site(
        point, split.error, split.dictionary, *batch.sites, batch.lengths_B - 1, *split.by_row(every_BxT)
    )
    ((chosen, features_K),) = edits.chunks(edits.dictionary.config.n_features)
    # Documents have no counterparts: there a swapped feature is taken away.
    source = ZERO if edits.replacement.kind == "counterpart" else edits.replacement
    changes = gather(point, split.dictionary, source, [read, domain_BxT], features_K, batch.documents)
    # Without the error, the clean run is that of the dictionary's reconstruction.
    is_shared = split.error == "keep"
    ends = [batch.end_BxTxD if is_shared else programs.tail(point, split.params, stream, value)]
    fraction_SxK, addend_SxK = edits.over(chosen, features_K)
    addend_SxK = np.zeros_like(fraction_SxK) if addend_SxK is None else addend_SxK
    for fraction_K, addend_K in zip(fraction_SxK, addend_SxK, strict=True):
        edited_BxTxD = _edited(point, value, domain_BxT, *changes, fraction_K, addend_K)
        ends.append(programs.tail(point, split.params, stream, edited_BxTxD))
    sums = programs.compare(point.config, split.params, jnp.stack(ends), batch.ids_BxT, batch.lengths_B)
    return [to_host(part).astype(np.float64).sum(axis=0)[:, : batch.documents] for part in sums]


@functools.partial(jax.jit, static_argnums=0)
def _run_prefix(
    point: SplitPoint, params: decoder.Params, ids_BxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return stream, value and what is read at the site, [B, T, D] each."""
    return jax.lax.with_sharding_constraint(point.run_prefix(params, ids_BxT), sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def _edited(
    point: SplitPoint,
    value_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    fall_BxTxK: jax.Array,
    W_dec_KxD: jax.Array,
    fraction_K: jax.Array,
    addend_K: jax.Array,
) -> jax.Array:
    """Return ``edit_value`` of documents under one edit, which adds at editable positions."""
    addend_BxTxK = jnp.where(domain_BxT[..., None], addend_K[None, None], 0.0)
    edited_BxTxD = edit_value(value_BxTxD, fall_BxTxK, W_dec_KxD, fraction_K[None, None], addend_BxTxK)
    return jax.lax.with_sharding_constraint(edited_BxTxD, sharding(point.mesh))
