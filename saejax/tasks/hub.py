"""Data sets of the Hugging Face hub, read through ``datasets``."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from saejax.errors import UserError
from saejax.models.hub import offline_if_unreachable

Found = TypeVar("Found")


@functools.cache
def hub_commit(hub: str, revision: str) -> str:
    """Return the commit that a data set's revision stands for now, or when it was last fetched where there is no hub.

    Args:
      hub: its id, such as "openai/gsm8k".
      revision: branch, tag or commit.

    Returns:
      40 hexadecimal digits.

    Raises:
      UserError: the hub cannot be reached and the data set was never fetched, or there is no such revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    # A commit needs no network.
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        with offline_if_unreachable():
            return str(HfApi().dataset_info(hub, revision=revision).sha)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        # Without the hub, its cache will be read: its commit is noted there.
        ref = Path(constants.HF_HUB_CACHE) / f"datasets--{hub.replace('/', '--')}" / "refs" / revision
        if ref.is_file():
            return ref.read_text().strip()
        raise UserError(
            f"the commit of the data set {hub} (revision {revision}) could not be found "
            f"({' '.join(str(error).split())[:200]}): check the name and the network, or give a local file instead"
        ) from None


def hub_configurations(hub: str, revision: str) -> list[str]:
    """Return the names of a data set's configurations; a ``UserError`` if it cannot be read."""
    import datasets

    return _fetched(hub, revision, lambda: datasets.get_dataset_config_names(hub, revision=revision))


def hub_rows(hub: str, configuration: str, revision: str, split: str, stream: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set.

    Args:
      hub: its id, such as "openai/gsm8k".
      configuration: its name; "": the only one.
      revision: branch, tag or commit.
      split: "train" or another.
      stream: reads it as far as rows are asked for, instead of fetching all of it first.

    Raises:
      UserError: it cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    wanted = dict(split=split, revision=revision, streaming=stream)
    rows = iter(_fetched(hub, revision, lambda: datasets.load_dataset(hub, configuration or None, **wanted)))
    # Each row by itself, as a stream can fail at any of them.
    while (row := _fetched(hub, revision, lambda: next(rows, None))) is not None:
        yield row


def _fetched(hub: str, revision: str, fetch: Callable[[], Found]) -> Found:
    import datasets
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it tries several times and would say so each time
    try:
        with offline_if_unreachable():
            return fetch()
    # RuntimeError: data sets that are a program, which ``datasets`` no longer runs.
    except (datasets.exceptions.DatasetsError, HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the data set {hub} (revision {revision}) could not be read from the hub ({reason[:200]}): check the name "
            "and the network, or give a local file instead"
        ) from None
