"""Who may ask the server: its own page alone."""

import asyncio

import pytest

from saejax.serving.guard import MOST, Guard

TOKEN, HOST = "a-token_1", "127.0.0.1:8765"


async def inside(scope, receive, send):
    """An application that says which path it was asked for."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": (scope["root_path"] + "|" + scope["path"]).encode()})


def ask(path, headers=(("host", HOST),), method="GET", kind="http", proxies=()):
    """What is sent for a request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = dict(type=kind, path=path, method=method, headers=[(a.encode(), b.encode()) for a, b in headers])
    asyncio.run(Guard(inside, TOKEN, [HOST, "localhost:8765"], proxies)(scope, None, send))
    return sent


@pytest.mark.parametrize("host", [HOST, "localhost:8765"])
@pytest.mark.parametrize("origin", [True, False])
def test_the_own_page_may_ask(host, origin):
    start, body = ask(f"/{TOKEN}/graph", [("host", host), *([("origin", f"http://{host}")] if origin else [])])
    assert start["status"] == 200 and body["body"].decode() == f"/{TOKEN}|/{TOKEN}/graph"
    headers = dict(start["headers"])
    assert headers[b"referrer-policy"] == b"no-referrer" and headers[b"cache-control"] == b"no-store"
    assert headers[b"content-security-policy"] == b"frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", [("host", HOST)]),
        ("/graph", [("host", HOST)]),
        (TOKEN[:-1], [("host", HOST)]),
        (f"/{TOKEN}x/", [("host", HOST)]),
        (f"/{TOKEN[:-1]}/", [("host", HOST)]),
        ("/ü/", [("host", HOST)]),
        (f"/x/{TOKEN}/", [("host", HOST)]),
        (f"/{TOKEN}/", []),
        (f"/{TOKEN}/", [("host", "127.0.0.1")]),
        (f"/{TOKEN}/", [("host", "127.0.0.1:1")]),
        (f"/{TOKEN}/", [("host", "evil.example:8765")]),  # a name that was led to this machine
        (f"/{TOKEN}/", [("host", HOST), ("host", "evil.example")]),
        (f"/{TOKEN}/", [("host", HOST), ("origin", "http://evil.example")]),
        (f"/{TOKEN}/", [("host", HOST), ("origin", "null")]),
        (f"/{TOKEN}/", [("host", HOST), ("origin", "http://127.0.0.1:9999")]),  # another server of this machine
        (f"/{TOKEN}/", [("host", HOST), ("origin", f"https://{HOST}")]),
        (f"/{TOKEN}/", [("host", HOST), ("origin", f"http://{HOST}"), ("origin", "http://evil.example")]),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_others_may_not(path, headers, method):
    more = [("content-type", "application/json"), ("content-length", "2")] if method == "POST" else []
    start, body = ask(path, [*headers, *more], method)
    assert start["status"] == 403 and TOKEN not in body["body"].decode()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:9000", "http://localhost:9000", 200),  # a tunnel from another port
        ("hub.example.org", "https://hub.example.org", 200),  # JupyterHub's proxy
        (HOST, "https://hub.example.org", 200),  # one that passes its own name on
        ("hub.example.org", None, 200),
        (HOST, f"http://{HOST}", 200),
        ("HUB.example.org", "https://Hub.Example.org", 200),
        ("hub.example.org:443", "https://hub.example.org", 200),  # the port of https, which browsers leave out
        ("lab.example.org", "https://lab.example.org", 200),
        ("[2001:DB8::1]", "http://[2001:db8::1]", 200),
        ("hub.example.org:8443", None, 403),
        ("hub.example.org", "https://evil.example", 403),
        ("evil.example", "https://hub.example.org", 403),
        ("hub.example.org.evil.example", None, 403),
        ("localhost:9001", None, 403),
        ("hub.example.org", "null", 403),
    ],
)
def test_a_tunnel_and_a_proxy_that_are_named_may_ask_with_the_token(host, origin, status):
    headers = [("host", host), *([("origin", origin)] if origin else [])]
    proxies = ["localhost:9000", "hub.example.org", "Lab.example.org:443", "[2001:db8::1]:80"]
    start, body = ask(f"/{TOKEN}/", headers, proxies=proxies)
    assert start["status"] == status and (status == 200 or "--hosts=HOST" in body["body"].decode())
    assert ask("/wrong/", headers, proxies=proxies)[0]["status"] == 403


def test_a_proxy_that_keeps_its_prefix_is_told():
    for prefix in ("/proxy/absolute/8765/", "/user/me/"):
        start, body = ask(f"{prefix}{TOKEN}/graph")
        text = body["body"].decode()
        assert text.startswith(f"{prefix} stands before the server's token: the proxy has to take it off")
        assert start["status"] == 403 and TOKEN not in text
    assert "lacks the server's token" in ask(f"/proxy/{TOKEN}x/")[1]["body"].decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("content-type", "application/json"), ("content-length", str(MOST))], 200),
        ([("content-type", "application/json"), ("content-length", str(MOST + 1))], 413),
        ([("content-type", "application/json"), ("content-length", "-1")], 413),
        ([("content-type", "application/json")], 413),
        ([("content-type", "application/json"), ("content-length", "2"), ("transfer-encoding", "chunked")], 413),
        ([("content-type", "text/plain"), ("content-length", "2")], 415),  # what a form of another page can send
        ([("content-length", "2")], 415),
    ],
)
def test_what_is_sent_is_json_and_small(headers, status):
    assert ask(f"/{TOKEN}/api/trace", [("host", HOST), *headers], "POST")[0]["status"] == status


def test_an_address_without_its_end_leads_to_the_list():
    """Relative, as a proxy may put a prefix before the token."""
    start, _ = ask(f"/{TOKEN}")
    assert start["status"] == 307 and dict(start["headers"])[b"location"] == f"{TOKEN}/".encode()
    assert ask(f"/{TOKEN}", [("host", "evil.example")])[0]["status"] == 403


def test_sockets_are_closed():
    assert ask(f"/{TOKEN}/", kind="websocket") == [{"type": "websocket.close"}]
