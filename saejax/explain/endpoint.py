"""An OpenAI-compatible endpoint: questions asked several at a time, and again where that may help.

What is asked again, and after how long, follows the convention of OpenAI's client: connections that fail, answers
that take too long, and the statuses 408, 409, 429 and 500 and above; after as long as the server says
(``Retry-After``, at most a minute), else after half a second, one, two, ... up to eight. A server that asks for a
pause is left alone by all.
"""

import concurrent.futures
import dataclasses
import email.message
import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.explain.questions import EmbeddingRequest, Question

KEY = "OPENAI_API_KEY"
_TRIES = 6
_LONGEST_PAUSE = 60.0  # seconds
_AGAIN = (408, 409, 429)  # and 500 and above
_LETTERS = 4  # characters of a token, where the endpoint does not count them


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
      text: of the answer; None: there was none, or it was cut.
      tokens: of the prompt, and of the answer.
    """

    text: str | None
    tokens: tuple[int, int]


Keep = Callable[[int, Answer], None]  # takes the number of a question and its answer


class Endpoint:
    """An endpoint.

    Args:
      url: its address, up to ``/v1``.
      model: the model's name there.
      at_once: questions that are asked at a time.
      timeout: seconds that an answer may take.

    Raises:
      UserError: the address is none.
    """

    def __init__(self, url: str, model: str, at_once: int, timeout: float):
        if urllib.parse.urlparse(url).scheme not in ("http", "https"):
            raise UserError(f"--explain.url={url} is no address: expected one such as http://localhost:8000/v1")
        self._url, self._model, self._at_once, self._timeout = url.rstrip("/"), model, at_once, timeout
        self._quiet_until, self._limit_name = 0.0, "max_tokens"
        self._pause: Callable[[float], Any] = time.sleep

    def ask(self, questions: Sequence[Question | EmbeddingRequest], keep: Keep) -> None:
        """Asks questions; ``keep`` is called, in this thread, with every answer as it comes.

        Raises:
          UserError: the endpoint refuses, or gives no answer however often it is asked; answers that came are kept.
        """
        lock = threading.Lock()

        def one(number: int) -> None:
            answer = self._answer(questions[number])
            with lock:
                keep(number, answer)

        with concurrent.futures.ThreadPoolExecutor(self._at_once) as threads:
            waiting = [threads.submit(one, number) for number in range(len(questions))]
            try:
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
            finally:
                threads.shutdown(cancel_futures=True)  # those that are asked already are kept

    def _answer(self, question: Question | EmbeddingRequest) -> Answer:
        if isinstance(question, EmbeddingRequest):
            return self._cosines(question)

        def asked_for() -> dict[str, Any]:
            said = dict(model=self._model, messages=question.messages, temperature=0)
            return said | {self._limit_name: question.most}

        body, choice = self._post("chat/completions", asked_for, _message)
        text = choice["message"].get("content")
        asked = _used(body, "prompt_tokens", question.task + question.text)
        told = _used(body, "completion_tokens", text or "")
        cut = choice.get("finish_reason") == "length" or not isinstance(text, str)
        return Answer(None if cut else text, (asked, told))

    def _cosines(self, question: EmbeddingRequest) -> Answer:
        texts = [*question.labels, *question.texts]
        asked_for = dict(model=question.model, input=texts, encoding_format="float")
        body, vector_NxE = self._post("embeddings", lambda: asked_for, lambda body: _vectors(body, len(texts)))
        vector_NxE /= np.maximum(np.linalg.norm(vector_NxE, axis=1, keepdims=True), 1e-30)
        cosine_LxT = vector_NxE[: len(question.labels)] @ vector_NxE[len(question.labels) :].T
        return Answer(json.dumps(cosine_LxT.round(6).tolist()), (_used(body, "prompt_tokens", question.text), 0))

    def _post(
        self, path: str, asked_for: Callable[[], Mapping[str, Any]], read: Callable[[Any], Any]
    ) -> tuple[dict[str, Any], Any]:
        """The endpoint's reply, and what is read of it.

        Args:
          path: after the address.
          asked_for: what is sent, made anew for each try.
          read: raises a ``ValueError`` or ``LookupError`` if the reply is not of the protocol.
        """
        said = ""
        for number in range(_TRIES):
            self._pause(max(0.0, self._quiet_until - time.monotonic()))
            pause = min(0.5 * 2**number, 8.0) * random.uniform(0.75, 1.0)
            try:
                body = self._send(path, asked_for())
                return body, read(body)
            except urllib.error.HTTPError as error:
                said, text = f"status {error.code}", error.read(2000).decode("utf-8", "replace")
                if error.code == 400 and "max_completion_tokens" in text and self._limit_name == "max_tokens":
                    self._limit_name, pause = "max_completion_tokens", 0.0  # as newer models call it
                elif error.code not in _AGAIN and error.code < 500:
                    key = f"; is the environment variable {KEY} set?" if error.code in (401, 403) else ""
                    raise UserError(f"{self._url} refuses the question with {said}: {text[:200]}{key}") from None
                elif asked := _asked_pause(error.headers):
                    pause, self._quiet_until = asked, max(self._quiet_until, time.monotonic() + asked)
            except (OSError, http.client.HTTPException) as error:  # connections, time limits
                said = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError, AttributeError):
                said = "its reply is not of this protocol"
            if number + 1 < _TRIES:
                self._pause(pause)
        raise UserError(
            f"--explain.url={self._url} gave no answer in {_TRIES} tries ({said}); what was answered is kept: run the "
            "same command to go on"
        )

    def _send(self, path: str, data: Mapping[str, Any]) -> dict[str, Any]:
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{self._url}/{path}", json.dumps(data).encode(), headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as reply:
            return json.loads(reply.read())


def _message(body: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of a reply, which has a message."""
    choice = body["choices"][0]
    if not isinstance(choice["message"], dict):
        raise ValueError("no message")
    return choice


def _vectors(body: Mapping[str, Any], count: int) -> np.ndarray:
    """The embeddings of a reply, float64 [count, E], in the order of the texts."""
    rows = sorted(body["data"], key=lambda one: one["index"])
    vector_NxE = np.array([one["embedding"] for one in rows], np.float64)
    if (
        [one["index"] for one in rows] != list(range(count))
        or vector_NxE.ndim != 2
        or not np.isfinite(vector_NxE).all()
    ):
        raise ValueError("not a vector for each text")
    return vector_NxE


def _used(body: Mapping[str, Any], name: str, text: str) -> int:
    """Tokens as the endpoint counts them, else by the length of the text."""
    return int((body.get("usage") or {}).get(name, len(text) // _LETTERS))


def _asked_pause(headers: email.message.Message) -> float:
    """Seconds that a server asks to wait, by ``Retry-After`` in seconds or as a date; 0: none, or too long."""
    text = headers.get("retry-after-ms") or headers.get("Retry-After") or ""
    try:
        wait = float(text) / (1000 if headers.get("retry-after-ms") else 1)
    except ValueError:
        date = email.utils.parsedate_tz(text)
        wait = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return wait if 0 < wait <= _LONGEST_PAUSE else 0.0
