"""Download files of the Hugging Face hub and upload to it, and explain its errors.

That the hub is out of reach is found out at once, where its own library would try again for 23 seconds.
"""

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from saejax.errors import UserError, out_of_room

_WAIT = 4.0  # seconds for a connection


def hub_folder(
    name: str, revision: str, files: Sequence[str], skipped: Sequence[str] = (), what: str = "model"
) -> Path:
    """Return the folder of a hub repository with the files of some patterns, fetched if need be.

    Args:
      name: name of the repository.
      revision: branch, tag or commit.
      files: patterns of files to fetch, at least one.
      skipped: patterns of files to leave out of those.
      what: the kind of content, in words, for messages.

    Raises:
      UserError: see ``hub_errors``.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name, revision, what, files[0], f"a {what}"):
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=list(skipped))
        )


@contextlib.contextmanager
def hub_errors(name: str, revision: str, what: str, file: str, expected: str) -> Iterator[None]:
    """Turn the errors of the hub into ``UserError``s that say what to do.

    ``name`` is the repository, ``what`` its kind, such as "model". It has to hold ``file``, which is part of what is
    ``expected``, at the revision.
    """
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    try:
        with offline_if_unreachable():
            yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence at {page}, then set the variable HF_TOKEN to a token of your account"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r}: see {page}/tree/main for branches and tags") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no {what} {name!r}, neither a folder here nor at {page}: check the name; if it is private, set "
            "the variable HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        # The hub did answer, with an error of its own: to speak of the network would mislead.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _not_fetched(name, error.__cause__) from None
        raise UserError(
            f"there is no folder {name} here, it is not in the hub's cache, and the hub cannot be reached (no network, "
            "or HF_HUB_OFFLINE is set): give a folder that is here, or connect"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"{page} has no {file} at revision {revision!r}: expected {expected}") from None
    except errors.HFValidationError:
        raise UserError(f"there is no folder {name!r}, and it is not a hub id such as org/name") from None
    except (errors.HTTPError, OSError) as error:  # of the hub, or of a connection that broke
        raise _not_fetched(name, error) from None


def _not_fetched(name: str, error: Exception) -> UserError:
    """Return the error for a download that failed, with a remedy."""
    remedy = "try again, or give a local folder"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        remedy = "the hub does not accept the token in the variable HF_TOKEN, or that of `hf auth login`: renew it"
    if out_of_room(error):
        remedy = "free space, or set the variable HF_HOME to a folder with room"
    return UserError(f"{name} could not be fetched ({error}): {remedy}")


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Switch the hub's libraries to offline mode for a block if the hub's address does not answer."""
    from huggingface_hub import constants

    # ``datasets`` has a switch of its own; to import it only for that would take seconds.
    modules = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    offline = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = offline or module.HF_HUB_OFFLINE
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _answers(address: str) -> bool:
    """Return whether a connection can be made; True behind a proxy, which alone knows."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme in urllib.request.getproxies() or "all" in urllib.request.getproxies():
        return True
    with contextlib.suppress(OSError):
        socket.create_connection(
            (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), _WAIT
        ).close()
        return True
    return False


def require_token() -> None:
    """Raise a ``UserError`` unless there is a token for the hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "publishing on the Hugging Face hub takes a token that may write: set the variable HF_TOKEN, or run "
            "`hf auth login`"
        )


def push_folder(
    folder: Path, name: str, message: str, private: bool = False, patterns: Sequence[str] | None = None
) -> str:
    """Upload the files of a folder to a model repository of the hub, all in one commit.

    Args:
      folder: the folder; other files of the repository stay.
      name: the repository, which is made if there is none.
      message: the message of the commit.
      private: whether a new repository can be seen by its owners alone.
      patterns: patterns of the files to upload; None: all.

    Returns:
      The address of the commit.

    Raises:
      UserError: there is no token, the hub refuses or cannot be reached; the repository has none of the files.
    """
    from huggingface_hub import HfApi, errors

    require_token()
    api = HfApi()
    try:
        with offline_if_unreachable():
            api.create_repo(name, private=private, exist_ok=True)
            only = None if patterns is None else [*patterns]
            commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, allow_patterns=only)
            return str(commit.commit_url)
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{name} was not pushed: the hub cannot be reached (no network, or HF_HUB_OFFLINE is set): connect, and "
            "push again"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{name!r} is no name of a repository on the hub: expected one such as org/name") from None
    except (errors.HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "the token may not write there: check the name and the token" if status in (401, 403) else "try again"
        raise UserError(f"{name} was not pushed ({' '.join(str(error).split())}): {remedy}") from None
