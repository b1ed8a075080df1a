"""A server of chat completions: it answers by rules, remembers what it was asked, and can fail."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def texts_of(prompt: str) -> list[str]:
    """The numbered texts of a question."""
    return re.split(r"\n\nText \d+: ", prompt.split("\n\nTokens that the feature makes")[0])[1:] or []


class Server:
    """A server on a free port.

    Args:
      answer: the reply's text to a prompt.
      troubles: what happens to the first requests, in turn: a status, "slow", "nonsense", "no choices", "closed",
        "null", "cut", "" (nothing), or the message of a status 400.
      retry_after: header of replies with a status.

    Attributes:
      asked: the prompts that were answered.
      tries: when each request came, with its body and headers.
    """

    def __init__(self, answer: Callable[[str], str], troubles: list = [], retry_after: str = ""):  # noqa: B006
        self.asked: list[str] = []
        self.tries: list[tuple[float, dict, Message, str]] = []
        left, lock = list(troubles), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                prompt = "\n\n".join(message["content"] for message in body.get("messages", ()))
                with lock:
                    self.tries.append((time.monotonic(), body, handler.headers, handler.path))
                    trouble = left.pop(0) if left else ""
                if trouble == "closed":
                    return handler.connection.close()
                if trouble == "slow":
                    handler.connection.recv(1)  # until the other side has gone
                    return None
                if isinstance(trouble, int):
                    extra = {"Retry-After": retry_after} if retry_after else {}
                    return self._send(handler, trouble, b'{"error": {"message": "not now"}}', extra)
                if trouble == "nonsense":
                    return self._send(handler, 200, b"<html>down</html>", {})
                if trouble == "no choices":
                    return self._send(handler, 200, b'{"choices": []}', {})
                if trouble not in ("", "null", "cut"):
                    return self._send(handler, 400, json.dumps(dict(error=dict(message=trouble))).encode(), {})
                with lock:
                    self.asked.append(prompt)
                message = dict(role="assistant", content=None if trouble == "null" else answer(prompt))
                reason = "length" if trouble == "cut" else "stop"
                usage = dict(prompt_tokens=len(prompt.split()), completion_tokens=7)
                reply = dict(choices=[dict(message=message, finish_reason=reason)], usage=usage)
                self._send(handler, 200, json.dumps(reply).encode(), {})

            def log_message(handler, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @staticmethod
    def _send(handler, status, data, headers):
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):  # who asked has left
            handler.wfile.write(data)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
