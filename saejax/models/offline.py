"""The hub out of reach: known at once, where its library would try again for 23 seconds."""

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator

_WAIT = 4.0  # seconds for a connection


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Has the hub's libraries use what was fetched before, and nothing else, where nobody answers at its address."""
    from huggingface_hub import constants

    places = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    offline = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = offline or place.HF_HUB_OFFLINE
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _answers(address: str) -> bool:
    """Whether a connection can be made; behind a proxy, which alone knows, it is taken to be so."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme in urllib.request.getproxies() or "all" in urllib.request.getproxies():
        return True
    with contextlib.suppress(OSError):
        socket.create_connection(
            (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), _WAIT
        ).close()
        return True
    return False
