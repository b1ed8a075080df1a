"""The documents of a run: made in memory, or on disk by the stage ``tokenize``, which never has all text in memory.

Streamed text is written as it comes. What is shuffled are the documents' starts, lengths and table rows, so that the
token ids themselves are written once. A document takes 21 bytes of memory while text is read, and 57 at the end.
"""

import array
import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from saejax.activations.checksums import npy_header
from saejax.activations.chunker import SPLITS, Chunker, TextPiece
from saejax.activations.documents import COLUMNS, FILES, Documents, shuffled_order
from saejax.activations.progress import TextProgress
from saejax.activations.request import CaptureRequest
from saejax.activations.results import TokenizeResults
from saejax.activations.settings import CaptureConfig
from saejax.activations.text import check_vocabulary, corpus_documents
from saejax.errors import Interrupted, UserError
from saejax.files import whole_file
from saejax.models import source
from saejax.models.identity import content_sha256
from saejax.models.settings import ModelConfig
from saejax.runner.results import load_results
from saejax.runner.workspace import Run
from saejax.tasks import corpora
from saejax.tasks.corpora import Document
from saejax.tasks.settings import CorpusConfig, TaskConfig

_MAX_GROUPS = 2**31 - 1


def run_tokenize(run: Run) -> TokenizeResults:
    """Turn the corpus into documents in ``run.folder``, reading it once from its front.

    A run that was stopped begins anew.

    Raises:
      UserError: the corpus, the tokenizer or a split is not usable.
      Interrupted: asked to stop.
    """
    config = run.configs[CorpusConfig]
    # Without the decoder: text can be tokenized for a model that only PyTorch runs.
    model = source.resolve(run.configs[ModelConfig], decoder=False)
    vocabulary = source.vocabulary(model)
    chunker = Chunker(
        config,
        source.load_tokenizer(model),
        source.longest_input(model) or config.context,
        run.configs[TaskConfig],
        run.configs[CaptureConfig].bos,
    )
    progress = TextProgress(run.say, corpora.characters(config, run.configs[TaskConfig]), "characters")

    def texts() -> Iterator[Document]:
        """Yield the corpus until no more of it is wanted."""
        for document in corpora.documents(config, run.configs[TaskConfig], chunker.has_enough):
            if run.stopping():
                raise Interrupted("stopped; the text is read anew: run the same command to start again")
            yield document
            progress.add(document.size)

    with _open_whole(run.folder / FILES[0]) as ids:
        writer = _DocumentsWriter(run.folder, ids)
        with _use_all_cores():
            for piece in chunker.pieces(texts(), lambda document: corpora.is_held_out(document, config)):
                check_vocabulary(model, vocabulary, piece.ids_T)
                writer.add(piece)
        # Before the prompts join: they are of the train split and would hide that it has no text.
        chunker.check([split for split, count in enumerate(writer.documents) if count])
        writer.finish(config.seed)
    return TokenizeResults(
        documents=dict(zip(SPLITS, writer.documents, strict=True)),
        tokens=dict(zip(SPLITS, writer.tokens, strict=True)),
        sha256={name: content_sha256(run.folder / name) for name in FILES},
    )


def text_documents(run: Run, request: CaptureRequest) -> Documents:
    """Return the documents of the corpus, from the stage ``tokenize`` if the run reads it.

    Raises:
      UserError: see ``corpus_documents``; tokenized text is damaged; the ends of packed texts are wanted.
    """
    last = run.configs[CaptureConfig].last
    if last and run.configs[CorpusConfig].pack:
        raise UserError(
            f"--capture.last={last} records the ends of texts, which --corpus.pack puts into the middle of pieces: use "
            "one of them"
        )
    if "tokenize" in run.inputs:
        folder = run.inputs["tokenize"]
        results: TokenizeResults = load_results(folder)
        for name, sha256 in results.sha256.items():
            if content_sha256(folder / name) != sha256:  # gigabytes, which are read once
                raise UserError(f"{folder / name} is damaged: delete {folder} and run tokenize again")
        return Documents.read(folder)
    return corpus_documents(run.configs, request)


class _DocumentsWriter:
    """Writer of the files of ``Documents``.

    Args:
      folder: the folder to write to.
      ids: its open file of token ids.
    """

    def __init__(self, folder: Path, ids: IO[bytes]):
        self._folder, self._ids = folder, ids
        self._rows = array.array("i")  # in the order of the text, of each document its length and ``COLUMNS``
        self.documents, self.tokens = [0] * len(SPLITS), [0] * len(SPLITS)
        self._ids.write(npy_header((0,), np.dtype(np.int32)))

    def add(self, piece: TextPiece) -> None:
        """Write a document."""
        # Groups are only compared with one another: two that share a number count as one, which does no harm.
        group = zlib.crc32(piece.group.encode()) % _MAX_GROUPS
        self._ids.write(piece.ids_T.tobytes())
        self._rows.extend([len(piece.ids_T), piece.split, group, piece.source, piece.start])
        self.documents[piece.split] += 1
        self.tokens[piece.split] += len(piece.ids_T)

    def finish(self, seed: int) -> None:
        """Write the arrays of documents in a seeded random order, train before held-out."""
        # The header has 128 bytes whatever the shape, so that it fits where an empty one was written.
        self._ids.seek(0)
        self._ids.write(npy_header((sum(self.tokens),), np.dtype(np.int32)))
        rows_Nx5 = np.frombuffer(self._rows, np.int32).reshape(-1, 1 + len(COLUMNS))
        starts_N = np.cumsum(rows_Nx5[:, 0], dtype=np.int64) - rows_Nx5[:, 0]
        order_N = shuffled_order(rows_Nx5[:, 1 + COLUMNS.index("split")], seed)
        arrays = starts_N, rows_Nx5[:, 0], rows_Nx5[:, 1:]
        for name, values in zip(FILES[1:], arrays, strict=True):
            ordered = values[order_N]
            with _open_whole(self._folder / name) as file:
                file.write(npy_header(ordered.shape, ordered.dtype))
                file.write(ordered.data)


@contextlib.contextmanager
def _open_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextlib.contextmanager
def _use_all_cores() -> Iterator[None]:
    """Let tokenizers use every core; elsewhere they use one, because processes are forked beside them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
