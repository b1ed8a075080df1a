"""Servers in this process, and what asks them."""

import contextlib
import http.client
import json
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "attribution"))

from saejax.serving.app import make_server
from saejax.serving.jobs import THREAD, Jobs
from saejax.serving.run import _listen

TOKEN = "the-token"


class Asker:
    """Asks a server as its page does."""

    def __init__(self, address):
        self.address, self._host = address, urlsplit(address).netloc

    def open(self, path, body=None, method="GET", **headers):
        """The connection and its answer, of which nothing is read yet."""
        connection = http.client.HTTPConnection(self._host, timeout=600)
        text = None if body is None else json.dumps(body)
        own = {"origin": f"http://{self._host}"} | ({"content-type": "application/json"} if text else {}) | headers
        connection.request(method, urlsplit(self.address).path + path, text, own)
        return connection, connection.getresponse()

    def get(self, path, **headers):
        connection, answer = self.open(path, **headers)
        with contextlib.closing(connection):
            return answer.status, answer.read().decode()

    def data(self, path):
        """What the page of a graph holds."""
        return json.loads(self.get(path)[1].split('id="graph-data">')[1].split("</script>")[0])

    def check_change(self, body, clean_V, edited_V, lm):
        """A change has these logits, in place of those without it; the graph explains the logit of way over runs."""
        result = self.work("api/change", body)[-1]["result"]
        logits_2xV = np.stack([clean_V, edited_V]).astype(np.float64)
        p_2xV = np.exp(logits_2xV) / np.exp(logits_2xV).sum(axis=1, keepdims=True)
        assert len(result["tokens"]) >= 8
        for token, shown in zip(np.argsort(-p_2xV[1])[:5], result["tokens"]):
            np.testing.assert_allclose(shown["logit"], logits_2xV[:, token], atol=2e-4)
            np.testing.assert_allclose(shown["probability"], p_2xV[:, token], atol=2e-5)
            assert shown["random"][0] <= shown["random"][1]
        assert result["kl"] == pytest.approx((p_2xV[0] * np.log(p_2xV[0] / p_2xV[1])).sum(), rel=1e-2, abs=1e-7)
        assert result["draws"] == len(result["random_kl"]) == 7 and min(result["random_kl"]) > 0
        (difference,) = result["differences"]
        assert difference["text"] == [" way", " runs"]
        first, second = (logits_2xV[:, lm.token_id(text)] for text in difference["text"])
        np.testing.assert_allclose(difference["value"], first - second, atol=3e-4)

    def work(self, path, body):
        """The lines of some work."""
        connection, answer = self.open(path, body, "POST")
        with contextlib.closing(connection):
            return [json.loads(line) for line in answer.read().splitlines()]


@contextlib.contextmanager
def served(store, session):
    """A running server; at the end no thread of it is left."""
    listening, jobs = _listen(0), Jobs()
    port = listening.getsockname()[1]
    server = make_server(store, session, jobs, TOKEN, port)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
    thread.start()
    try:
        yield Asker(f"http://127.0.0.1:{port}/{TOKEN}/")
    finally:
        jobs.stop()
        server.should_exit = True
        thread.join()
        jobs.close()
        assert not [one for one in threading.enumerate() if one.name == THREAD]


@pytest.fixture(scope="module")
def serve():
    """Starts servers that end with the module."""
    with contextlib.ExitStack() as stack:
        yield lambda store, session: stack.enter_context(served(store, session))
