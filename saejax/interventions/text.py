"""Held-out text, which has nothing to do with a behaviour, under edits: cross-entropy and divergence.

The text is held-out documents of the corpus, of which the first tokens are read. Edits act at all positions but
attention sinks. Where a counterpart's activations replace others, text has none, and they are set to zero.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.evaluation import programs
from saejax.interventions.edits import ZERO, FeatureEdits
from saejax.interventions.rows import edit_value, gather
from saejax.interventions.split_model import SplitModel, fit_ids, run_head
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.split import SplitPoint
from saejax.models.tokens import encode, pad
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import sharding
from saejax.settings import CorpusConfig, TaskConfig
from saejax.tasks import corpora

LENGTH = 64  # tokens of a document
_AT_ONCE = 4  # documents of a program


@dataclasses.dataclass(frozen=True)
class TextDiffs:
    """Sums over the predicted tokens of N documents."""

    tokens_N: np.ndarray  #: number of predicted tokens of each document
    clean_N: np.ndarray  #: clean cross-entropy, nats
    rise_SxN: np.ndarray  #: rise of the cross-entropy under each of S edits, nats
    kl_SxN: np.ndarray  #: KL(clean || edited), nats


class HeldOutText:
    """Documents on which edits are run.

    Args:
      documents: token ids, at least 2 of each.
    """

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.documents = [list(document) for document in documents]
        self._clean: dict[SplitPoint, list[CleanText]] = {}

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
        ids = [encode(model.tokenizer, document.text[: 16 * length])[:length] for document in chosen]
        read = [document for document in ids if len(document) > 1]
        return cls(read) if read else None

    def effects(self, split: SplitModel, edits: FeatureEdits) -> TextDiffs:
        """Return the effects of S edits on the documents.

        Args:
          split: the model, split at the site that the edits' dictionary writes to.
          edits: edits of the split's dictionary.
        """
        parts = [_run_edits(split, edits, clean) for clean in self._clean_runs(split)]
        ce_ExN, kl_ExN = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        tokens_N = np.array([len(document) - 1 for document in self.documents])
        return TextDiffs(tokens_N, clean_N=ce_ExN[0], rise_SxN=ce_ExN[1:] - ce_ExN[0], kl_SxN=kl_ExN[1:])

    def _clean_runs(self, split: SplitModel) -> "list[CleanText]":
        """Return the batches of documents without an edit; those with the error kept serve all dictionaries of a site.

        They are kept for the model that asked last.
        """
        if split.error != "keep":
            return self._run_clean(split)  # whose values are those of this dictionary alone
        # Another model's runs would only take memory.
        if self._clean and next(iter(self._clean.values()))[0].params is not split.params:
            self._clean.clear()
        if split.point not in self._clean:
            self._clean[split.point] = self._run_clean(split)
        return self._clean[split.point]

    def _run_clean(self, split: SplitModel) -> "list[CleanText]":
        """Run the documents, ``_AT_ONCE`` at a time, padded to the length of the longest."""
        batches, width = [], round_length(max(map(len, self.documents)))
        for first in range(0, len(self.documents), _AT_ONCE):
            documents = self.documents[first : first + _AT_ONCE]
            padded = pad([*documents, *[[0, 0]] * (_AT_ONCE - len(documents))])
            ids_BxT = fit_ids(padded.ids_BxT, width)
            arrays = ids_BxT, padded.last_B, np.ones(ids_BxT.shape, bool), padded.lengths_B
            *rows, lengths_B = split.by_row(*arrays)
            stream, value, read, domain, _ = run_head(split.point, split.error, split.params, split.dictionary, *rows)
            end_BxTxD = programs.tail(split.point, split.params, stream, value)
            clean = rows[0], lengths_B, stream, value, read, domain, end_BxTxD
            batches.append(CleanText(split.params, len(documents), *clean))
        return batches


class CleanText(NamedTuple):
    """A batch of B documents without an edit, of which the first ``documents`` are real.

    Other fields are as in ``CleanRun``; ``end_BxTxD`` is the stream leaving the last layer.
    """

    params: decoder.Params
    documents: int
    ids_BxT: jax.Array
    lengths_B: jax.Array
    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    read_BxTxD: jax.Array
    domain_BxT: jax.Array
    end_BxTxD: jax.Array


def _run_edits(split: SplitModel, edits: FeatureEdits, clean: CleanText) -> list[np.ndarray]:
    """Return cross-entropy and divergence of documents, [E, N]: clean ones, then edited."""
    point, domain_BxT = split.point, clean.domain_BxT
    if split.error == "keep":
        # Attention sinks are each dictionary's, but the run serves all dictionaries of the site.
        domain_BxT = _domain(split.dictionary, clean.read_BxTxD, clean.value_BxTxD, clean.lengths_B)
    ((chosen, features_K),) = edits.chunks(edits.dictionary.config.n_features)
    # Documents have no counterparts: there a swapped feature is taken away.
    source = ZERO if edits.replacement.kind == "counterpart" else edits.replacement
    arrays = [clean.read_BxTxD, domain_BxT]
    changes = gather(point, split.dictionary, source, arrays, features_K, clean.documents)
    ends = [clean.end_BxTxD]
    fraction_SxK, addend_SxK = edits.over(chosen, features_K)
    addend_SxK = np.zeros_like(fraction_SxK) if addend_SxK is None else addend_SxK
    for fraction_K, addend_K in zip(fraction_SxK, addend_SxK, strict=True):
        value_BxTxD = _edited(point, clean.value_BxTxD, domain_BxT, *changes, fraction_K, addend_K)
        ends.append(programs.tail(point, split.params, clean.stream_BxTxD, value_BxTxD))
    # All edits with one clean run: its log-probabilities are not kept between programs.
    sums = programs.compare(point.config, split.params, jnp.stack(ends), clean.ids_BxT, clean.lengths_B)
    return [to_host(part).astype(np.float64).sum(axis=0)[:, : clean.documents] for part in sums]


@jax.jit
def _domain(dictionary: Dictionary, read_BxTxD: jax.Array, value_BxTxD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Return True at real tokens that are no attention sinks of the dictionary, [B, T]."""
    real_BxT = jnp.arange(read_BxTxD.shape[1])[None, :] < lengths_B[:, None]
    return real_BxT & dictionary.is_not_sink(read_BxTxD, value_BxTxD)


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
