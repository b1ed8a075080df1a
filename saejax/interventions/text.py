"""Held-out text, which has nothing to do with a behaviour, under edits: its cross-entropy.

The text is held-out documents of the corpus, of which the first tokens are read. Edits act at all positions but
attention sinks. Where a counterpart's activations replace others, text has none, and they are set to zero. The layers
below the site and the text without an edit are run once for all behaviours, and for all dictionaries of a site.
"""

import functools
from collections.abc import Sequence

import numpy as np

from saejax.interventions.edits import FeatureEdits
from saejax.interventions.references import Reference, References
from saejax.interventions.split_model import KEPT_BYTES, SplitModel
from saejax.models.language_model import LanguageModel
from saejax.tasks import corpora
from saejax.tasks.settings import CorpusConfig, TaskConfig

LENGTH = 64  # tokens of a document
STEP = 8  # every so many-th document is run with controls, too: they are looked at, and decide nothing
_BATCH_TOKENS = 2048  # of a program, padding included


class HeldOutText:
    """Documents on which edits are run.

    Args:
      documents: token ids, at least 2 of each.
    """

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.documents = [list(document) for document in documents]
        #: what earlier calls ran, and each document's log-likelihood without an edit
        self._clean: list[tuple[References, np.ndarray]] = []

    @classmethod
    def of(
        cls, corpus: CorpusConfig, task: TaskConfig, model: LanguageModel, count: int, length: int = LENGTH
    ) -> "HeldOutText | None":
        """Return documents of the corpus, evenly spread over the held-out ones; None if there are none.

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

    @functools.cached_property
    def few(self) -> "HeldOutText":
        """The documents that controls are run on, too."""
        return HeldOutText(self.documents[::STEP])

    def effects(self, split: SplitModel, edits: FeatureEdits) -> np.ndarray:
        """Return the cross-entropy of N documents under S edits.

        Args:
          split: the model, split at the site that the edits' dictionary writes to.
          edits: edits of the split's dictionary.

        Returns:
          Float64 array ``[1 + S, N]``: without an edit, then with each; means over predicted tokens, in nats.
        """
        answer_N = np.array([len(document) - 1 for document in self.documents])
        for references, clean_N in self._clean:
            if references.split.reads_like(split):
                return -references.with_split(split).log_likelihoods(edits, clean_N=clean_N) / answer_N
        texts = [Reference(document[:1], document[1:]) for document in self.documents]
        references = References(split, texts, _BATCH_TOKENS)
        # The stream, the site's value and what is read; of many documents they would take gigabytes.
        if 3 * 4 * split.point.config.d_model * sum(map(len, texts)) <= KEPT_BYTES:
            references.keep_batches()
        logp_ExN = references.log_likelihoods(edits)
        if split.error == "keep":
            self._clean.append((references, logp_ExN[0]))
        return -logp_ExN / answer_N
