"""The documents of a corpus, cut for a model from the corpus itself."""

import numpy as np

from saejax.activations.documents import Documents, make_documents
from saejax.activations.request import CaptureRequest
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs
from saejax.errors import UserError
from saejax.models import source
from saejax.tasks.settings import CorpusConfig, TaskConfig


def corpus_documents(configs: Configs, request: CaptureRequest) -> Documents:
    """Read the corpus of the settings and cut it into documents for the model of a request.

    Raises:
      UserError: see ``make_documents``; or a token has no embedding.
    """
    config, tokenizer = configs[CorpusConfig], source.load_tokenizer(request.source)
    documents = make_documents(
        config, tokenizer, request.context or config.context, configs[TaskConfig], configs[CaptureConfig].bos
    )
    check_vocabulary(request.source, source.vocabulary(request.source), documents.ids_T)
    return documents


def check_vocabulary(model: source.ModelSource, vocabulary: int | None, ids_T: np.ndarray) -> None:
    """Raise a ``UserError`` if a token id has no embedding.

    Args:
      model: where the model comes from.
      vocabulary: number of its embeddings; None: not known.
      ids_T: token ids of the text.
    """
    largest = int(ids_T.max())
    if vocabulary is not None and largest >= vocabulary:
        tokenizer = source.load_tokenizer(model)
        if largest >= len(tokenizer):
            raise UserError(
                f"the text holds the token id {largest}, and the model has embeddings for {vocabulary}: expected ids "
                "of its own tokenizer; tokenize the text anew, or name text by --corpus.field"
            )
        raise UserError(
            f"the text holds {tokenizer.decode([largest])!r}, a special token for which the model "
            "has no embedding: remove it from the text"
        )
