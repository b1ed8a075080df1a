"""Access control: requests need the server's token, its own page as origin and its own host name.

A page of another site can send requests to 127.0.0.1, and with a name of its own that it has lead here (DNS rebinding)
it could read the answers. So a request is refused if its Host is not this server's, if it comes from another Origin, or
if its path does not begin with the token. Pages may load nothing from elsewhere and stand in no frame. A tunnel from
another port and the proxies of notebooks ask by other names, which the user allows.
"""

import re
import secrets
from collections.abc import Iterable
from typing import Any

MOST = 1 << 20  # bytes of a request
_REDIRECT = 307
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",  # the address has the token
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuses what does not come from the server's own page, before the application sees it.

    Args:
      app: an ASGI application; it finds its paths without the token.
      token: the first part of every path.
      hosts: names with the port at which the server may be asked, such as "127.0.0.1:8765".
      proxies: further such names, of tunnels and of proxies that users trust, such as "hub.example.org"; a proxy may
        pass its own name on or not, and its pages may be of https.
    """

    def __init__(self, app: Any, token: str, hosts: Iterable[str], proxies: Iterable[str] = ()):
        self._app, self._token = app, token
        self._hosts, self._proxies = (frozenset(map(_plain, names)) for names in (hosts, proxies))

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer an ASGI request, or pass it on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                security_headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *security_headers]}
            await send(message)

        if refusal := self._refusal(scope):
            status, why = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            if status == _REDIRECT:
                headers.append((b"location", why.encode()))
            await guarded({"type": "http.response.start", "status": status, "headers": headers})
            return await guarded({"type": "http.response.body", "body": why.encode()})
        await self._app({**scope, "root_path": f"/{self._token}"}, receive, guarded)

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Return the status and the reason, or where to go instead; None: the request may pass."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = list(map(_plain, headers.get("host", [])))
        if len(hosts) != 1 or hosts[0] not in self._hosts | self._proxies:
            return 403, "another host is asked for: start the server with --hosts=HOST to allow a tunnel or proxy"
        pages = {
            f"http://{hosts[0]}",
            *(f"{scheme}://{host}" for host in self._proxies for scheme in ("http", "https")),
        }
        if not pages.issuperset(map(_plain, headers.get("origin", []))):
            return 403, "another page asks: start the server with --hosts=HOST to allow a tunnel or proxy"
        token, *rest = scope["path"].removeprefix("/").split("/")
        if not self._is_token(token):
            if any(map(self._is_token, rest)):
                before = scope["path"][: scope["path"].index(self._token)]
                return 403, (
                    f"{before} stands before the server's token: the proxy has to take it off, as /proxy/PORT/ of "
                    "jupyter-server-proxy does and /proxy/absolute/PORT/ does not"
                )
            return 403, "the address lacks the server's token: open the one that the server printed"
        if not rest and scope["method"] == "GET":  # copied without its end, from which other addresses are relative
            return _REDIRECT, f"{token}/"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if headers.get("content-type") != ["application/json"]:
            return 415, "expected JSON"
        # Of a body in chunks the length is not known, whatever is said of it.
        (size,) = [""] if "transfer-encoding" in headers else headers.get("content-length", [""])[:1]
        return None if size.isdecimal() and int(size) <= MOST else (413, f"expected at most {MOST} bytes, and how many")

    def _is_token(self, part: str) -> bool:
        return secrets.compare_digest(part.encode("utf-8", "replace"), self._token.encode())


def _plain(name: str) -> str:
    """Return a host or a page's origin as browsers send it: in small letters, without the port of its scheme."""
    return re.sub(r":(80|443)$", "", name.lower())
