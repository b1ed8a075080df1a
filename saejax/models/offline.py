"""Find out at once that the hub is out of reach, where its library would try again for 23 seconds."""

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator

_WAIT = 4.0  # seconds for a connection


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Switch the hub's libraries to offline mode for a block if the hub's address does not answer."""
    from huggingface_hub import constants

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
