"""The documents of a run: made in memory, or on disk by the stage ``tokenize``, which never has all text in memory."""

import contextlib
import os
from collections.abc import Iterator

from saejax.activations.cutter import SPLITS, Cutter, TextPiece, prompt_group
from saejax.activations.documents import Documents, make_documents
from saejax.activations.progress import TextProgress
from saejax.activations.request import CaptureRequest, longest_input
from saejax.activations.results import TokenizeResults
from saejax.activations.shuffled import ShuffledWriter
from saejax.errors import Interrupted, UserError
from saejax.files import file_sha256
from saejax.models import source
from saejax.results import load_results
from saejax.settings import CorpusConfig, ModelConfig, TaskConfig
from saejax.tasks import corpora
from saejax.tasks.behaviours import Prompt, read_prompts
from saejax.tasks.corpora import Document
from saejax.workspace import Run


def run_tokenize(run: Run) -> TokenizeResults:
    """Turns the corpus into documents in ``run.folder``, reading it once from its front.

    A run that was stopped begins anew.

    Raises:
      UserError: the corpus, the tokenizer or a split is not usable.
      Interrupted: asked to stop.
    """
    config = run.configs[CorpusConfig]
    found = source.resolve(run.configs[ModelConfig], decoder=False)
    prompts, vocabulary = _train_prompts(run), source.vocabulary(found)
    groups = tuple(sorted({prompt_group(prompt) for prompt in prompts.values()}))
    cutter = Cutter(
        config, source.load_tokenizer(found), longest_input(found) or config.context, run.configs[TaskConfig]
    )
    writer = ShuffledWriter(run.folder, groups, config.seed)
    progress = TextProgress(run.say, corpora.characters(config, run.configs[TaskConfig]), "characters")

    def texts() -> Iterator[Document]:
        for document in corpora.documents(config, run.configs[TaskConfig], cutter.enough):
            if run.stopping():
                raise Interrupted("stopped; the text is read anew: run the same command to start again")
            yield document
            progress.add(len(document.text))

    def take(piece: TextPiece) -> None:
        if vocabulary is not None and piece.ids_T.max() >= vocabulary:
            raise _no_embedding(found, int(piece.ids_T.max()))
        writer.add(piece)

    with _all_cores():
        for piece in cutter.pieces(texts(), lambda document: corpora.is_held_out(document, config)):
            take(piece)
    cutter.check([split for split, count in enumerate(writer.documents) if count])
    for piece in cutter.prompts(prompts):
        take(piece)
    return TokenizeResults(
        documents=dict(zip(SPLITS, writer.documents, strict=True)),
        tokens=dict(zip(SPLITS, writer.tokens, strict=True)),
        groups=groups,
        sha256=writer.finish(),
    )


def text_documents(run: Run, request: CaptureRequest) -> Documents:
    """The documents of the corpus and, with --corpus.behaviours, the behaviours' train prompts.

    Raises:
      UserError: what ``make_documents`` says, or tokenized text is damaged.
    """
    if "tokenize" in run.inputs:
        folder = run.inputs["tokenize"]
        results: TokenizeResults = load_results(folder)
        for name, sha256 in results.sha256.items():
            if file_sha256(folder / name) != sha256:
                raise UserError(f"{folder / name} is damaged: delete {folder} and run tokenize again")
        return Documents.read(folder, results.groups)
    config, tokenizer = run.configs[CorpusConfig], source.load_tokenizer(request.source)
    documents = make_documents(
        config, _train_prompts(run), tokenizer, request.context or config.context, run.configs[TaskConfig]
    )
    vocabulary = source.vocabulary(request.source)
    if vocabulary is not None and documents.ids_T.max() >= vocabulary:
        raise _no_embedding(request.source, int(documents.ids_T.max()))
    return documents


def _train_prompts(run: Run) -> dict[int, Prompt]:
    """The prompts that join the text, by their index in their file."""
    prompts = read_prompts(run.inputs["baseline"] / "prompts.jsonl") if "baseline" in run.inputs else []
    return {index: prompt for index, prompt in enumerate(prompts) if prompt.split == "train"}


def _no_embedding(found: source.ModelSource, token: int) -> UserError:
    return UserError(
        f"the text holds {source.load_tokenizer(found).decode([token])!r}, a special token for which the model has no "
        "embedding: remove it from the text"
    )


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Has tokenizers use every core; elsewhere they use one, because processes are forked beside them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
