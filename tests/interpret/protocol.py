"""A server of chat completions: it answers by rules, remembers what it was asked, and can fail."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_ANSWERED = ("", "null", "cut", "uncounted")  # with a chat completion


def texts_of(prompt: str) -> list[str]:
    """The numbered texts of a question."""
    return re.split(r"\n\nText \d+: ", prompt.split("\n\nTokens that the feature makes")[0])[1:] or []


class Server:
    """A server on a free port.

    Args:
      answer: the reply's text to a prompt.
      troubles: what happens to the first requests, in turn: a status, perhaps with its message, "slow", "nonsense",
        "no choices", "closed", "null", "cut", "uncounted", "" (nothing), or the message of a status 400.
      retry_after: header of replies with a status.

    Attributes:
      asked: the prompts that were answered.
      tries: when each request came, with its body and headers.
    """

    def __init__(self, answer: Callable[[str], str], troubles: Iterable = (), retry_after: str = ""):
        self.asked: list[str] = []
        self.tries: list[tuple[float, dict, Message, str]] = []
        self._answer, self._troubles, lock = answer, list(troubles), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                prompt = "\n\n".join(message["content"] for message in body.get("messages", ()))
                with lock:
                    self.tries.append((time.monotonic(), body, handler.headers, handler.path))
                    trouble = self._troubles.pop(0) if self._troubles else ""
                    if trouble in _ANSWERED:
                        self.asked.append(prompt)
                if trouble == "closed":
                    handler.connection.close()
                elif trouble == "slow":
                    handler.connection.recv(1)  # until the other side has gone
                else:
                    status, data = self._reply(trouble, prompt)
                    handler.send_response(status)
                    if isinstance(trouble, int) and retry_after:
                        handler.send_header("Retry-After", retry_after)
                    handler.send_header("Content-Length", str(len(data)))
                    handler.end_headers()
                    with contextlib.suppress(OSError):  # who asked has left
                        handler.wfile.write(data)

            def log_message(handler, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _reply(self, trouble: int | str | tuple[int, str], prompt: str) -> tuple[int, bytes]:
        if isinstance(trouble, tuple):
            return trouble[0], json.dumps(dict(detail=trouble[1])).encode()
        if isinstance(trouble, int):
            return trouble, b'{"error": {"message": "not now"}}'
        if trouble == "nonsense":
            return 200, b"<html>down</html>"
        if trouble == "no choices":
            return 200, b'{"choices": []}'
        if trouble not in _ANSWERED:
            return 400, json.dumps(dict(error=dict(message=trouble))).encode()
        message = dict(role="assistant", content=None if trouble == "null" else self._answer(prompt))
        choice = dict(message=message, finish_reason="length" if trouble == "cut" else "stop")
        usage = dict(prompt_tokens=len(prompt.split()), completion_tokens=None if trouble == "uncounted" else 7)
        return 200, json.dumps(dict(choices=[choice], usage=usage)).encode()

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
