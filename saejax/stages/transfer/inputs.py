"""Inputs of the comparison of dictionaries, from workdirs: the dictionaries, their dead features, and shared text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries.formats import folders_of, read_config
from saejax.dictionaries.names import is_folder
from saejax.errors import Interrupted, UserError
from saejax.evaluation.reconstruction import read_blocks, reconstruct
from saejax.links import resolve_links
from saejax.matching.transfer.activity import first_texts
from saejax.matching.transfer.compared import Compared
from saejax.matching.transfer.reading import SharedText, TextsToRead, read_shared_text
from saejax.models.settings import ModelConfig
from saejax.runner import stacks
from saejax.runner.labels import feature_names
from saejax.runner.workspace import Run
from saejax.stages.identities import split_trained
from saejax.tasks import corpora
from saejax.tasks.settings import CorpusConfig, TaskConfig


def load_compared(names: Sequence[str], units: Mapping[str, Path], flag: str) -> list[Compared]:
    """Find the dictionaries that a flag names, in its order; of a stack all members.

    Args:
      names: kinds, members or folders.
      units: folders of the train units, such as of "train/topk" or "train/topk/k16".
      flag: the flag, for messages.

    Raises:
      UserError: one does not exist or is named twice.
    """
    compared: list[Compared] = []
    for name in names:
        if is_folder(name):
            compared += [Compared(str(folder), folder, read_config(folder)) for folder in folders_of(name)]
            continue
        folders = stacks.find_trained(name, units, flag)
        compared += [Compared(full_name, folder, read_config(folder)) for full_name, folder in folders.items()]
    resolved = [entry.folder.resolve() for entry in compared]
    for entry, folder in zip(compared, resolved, strict=True):
        if resolved.count(folder) > 1:
            raise UserError(f"{flag}={','.join(names)} names {entry.name} twice: name each dictionary once")
    return compared


def read_run_text(
    run: Run,
    compared: Sequence[Compared],
    mesh: Mesh,
    tokens: int,
    batch_tokens: int,
    seed: int,
    keep_values: bool = False,
) -> SharedText:
    """Have the models of dictionaries read held-out text of the run's corpus; see ``read_shared_text``.

    Args:
      run: the run; files go to a folder "text" in its folder.
      compared: the dictionaries.
      mesh: devices of models and dictionaries.
      tokens: approximate number of tokens.
      batch_tokens: tokens in a batch.
      seed: seed of the order of documents.
      keep_values: whether values of sites are written, too.

    Raises:
      UserError: there is no text, a model does not exist, or it is not the one that a dictionary belongs to.
      Interrupted: asked to stop.
    """

    def check_stop() -> None:
        if run.stopping():
            raise Interrupted("stopped while text was read, which is read anew: run the same command to go on")

    corpus = run.configs[CorpusConfig]
    held_out = corpora.held_out_documents(corpus, run.configs[TaskConfig])
    order = np.random.default_rng(seed).permutation(len(held_out))
    # Held-out text, because dictionaries fit the text that they were trained on.
    texts = first_texts([held_out[i].text for i in order], tokens)
    return read_shared_text(
        TextsToRead(texts, corpus.context, batch_tokens),
        compared,
        run.configs[ModelConfig],
        mesh,
        folder=run.folder / "text",
        keep_values=keep_values,
        say=run.say,
        check_stop=check_stop,
    )


def find_names(compared: Compared, run: Run) -> dict[int, str]:
    """Return the names of a dictionary's features: of a dictionary of this run, the names in the units it reads."""
    workdir, name = trained_in(compared, run.folder.parent)
    return feature_names(workdir, name, compared.folder, {} if is_folder(compared.name) else run.inputs)


def trained_in(compared: Compared, workdir: Path) -> tuple[Path, str]:
    """Return the workdir that trained a dictionary, or else another one, and its name there."""
    trained = split_trained(compared.folder) if is_folder(compared.name) else None
    return trained or (workdir, compared.name)


def knows_live(compared: Compared, workdir: Path) -> bool:
    """Return whether ``live_features`` gives an answer."""
    return bool(_evaluated(compared, workdir) or _store(compared, workdir))


def live_features(compared: Compared, workdir: Path, mesh: Mesh, batch: int) -> np.ndarray | None:
    """Return which features fire on held-out text, bool [F]; None if the workdir that trained them has none.

    Where ``evaluate`` has not measured it, it is measured here, in the same way.

    Args:
      compared: the dictionary.
      workdir: of the run.
      mesh: devices that encode.
      batch: tokens in a batch.
    """
    if path := _evaluated(compared, workdir):
        return np.load(path) > 0
    if not (store := _store(compared, workdir)):
        return None
    dictionary = compared.load(mesh).with_sink_norms(store.max_norm, True)
    blocks = read_blocks(store, "held_out", (compared.config.site, compared.target), batch)
    return reconstruct([dictionary], blocks, mesh, batch)[0].firing_rate_F > 0


def _evaluated(compared: Compared, workdir: Path) -> Path | None:
    """Return the firing rates that ``evaluate`` wrote; None if there are none of this dictionary."""
    root, name = trained_in(compared, workdir)
    folder = stacks.find_results(root, "evaluate", name, compared.folder)
    return path if folder and (path := folder / "firing_rate.npy").is_file() else None


def _store(compared: Compared, workdir: Path) -> Store | None:
    """Return the store of the workdir that trained a dictionary; None if it has no held-out text at its sites."""
    sites = {compared.config.site, compared.target}
    try:
        store = Store.open(resolve_links(trained_in(compared, workdir)[0] / "capture"))
    except UserError:  # there is none, or its values were deleted when training was done
        return None
    fits = store.model.fingerprint == compared.fingerprint and sites <= {*store.sites}
    return store if fits and len(store.rows("held_out", *sites)) else None
