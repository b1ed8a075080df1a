"""A language model behind an OpenAI-compatible endpoint that answers questions.

Answers are kept in ``answers.jsonl`` as they arrive, so that no question is paid for twice. It has a line for each: a
hash of model and question, the question's text, the answer and its token counts. A last line that a killed run left
incomplete is ignored.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from saejax.errors import Interrupted, UserError
from saejax.files import fingerprint
from saejax.interpret.questions import Question
from saejax.interpret.settings import ExplainConfig
from saejax.progress import OnProgress
from saejax.unicode import replace_surrogates

KEY = "OPENAI_API_KEY"
TIMEOUT = 120.0  # seconds for an answer: a model that reasons takes a minute
MAX_TOKENS = 4096  # of an answer of an endpoint, whose model may reason first; a longer one is not used
_RETRIES = 5  # with the client's waits: as the server asks (Retry-After), or 0.5 to 8 s, doubling
_LETTERS = 4  # characters per token, where the endpoint reports no usage
ANSWERS = "answers.jsonl"
_LOT = 64  # questions handed over together; a run looks at its limit of tokens between two such lots
_LOOK_EVERY, _LAST = 0.2, 10.0  # seconds between looks whether to stop; for which a run that stops waits for answers
_NO_THINKING = dict(enable_thinking=False)  # Qwen3 and others; templates without the variable ignore it


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer."""

    text: str | None  #: the reply; None: there was none, or it was truncated
    tokens: int  #: number of tokens of the prompt and the reply


class Endpoint:
    """An OpenAI-compatible endpoint, asked through OpenAI's client, which retries what may succeed later.

    Models differ in the parameters they take. The first request has temperature 0, ``max_tokens`` and no thinking; a
    parameter that the endpoint names in a status 400 or 422 is renamed or dropped, for all later questions too.

    Args:
      url: address, up to ``/v1``.
      model: the model's name there.
      timeout: longest time for an answer, in seconds.

    Raises:
      UserError: the address is not a URL, or the client is not installed.
    """

    def __init__(self, url: str, model: str, timeout: float = TIMEOUT):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--explain.url={url} is not a URL: expected one such as http://localhost:8000/v1")
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"--explain.url needs OpenAI's client, which cannot be imported ({error}): pip install openai"
            ) from error
        self._openai, self._url, self._model = openai, url, model
        key = os.environ.get(KEY) or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=_RETRIES)
        self._lock = threading.Lock()
        self._limit_name = "max_tokens"
        self._options: dict[str, Any] = dict(temperature=0, chat_template_kwargs=_NO_THINKING)

    def ask(self, question: Question) -> Answer:
        """Return the answer to a question; several threads may ask.

        Raises:
          UserError: the endpoint refuses the question, or gives no answer after all retries.
        """
        openai = self._openai
        while True:
            options, limit_name = dict(self._options), self._limit_name
            try:
                reply = self._client.chat.completions.create(
                    model=self._model,
                    messages=question.messages,  # type: ignore[arg-type]
                    extra_body=options | {limit_name: MAX_TOKENS},
                )
                return _read_reply(reply, question)
            except openai.APIStatusError as error:
                if error.status_code in (400, 422) and self._adapt(error, options, limit_name):
                    continue
                if error.status_code >= 500 or error.status_code in (408, 409, 429):
                    raise self._no_answer(_message(error)) from None
                key = f"; check the environment variable {KEY}" if error.status_code in (401, 403) else ""
                raise UserError(f"{self._url} refuses the question: {_message(error)}{key}") from None
            except openai.APIError as error:  # connections, time limits, replies that are not JSON
                raise self._no_answer(str(error) or type(error).__name__) from None
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise self._no_answer(f"its reply is no chat completion ({type(error).__name__})") from None

    def _adapt(self, error: Any, options: dict[str, Any], limit_name: str) -> bool:
        """Rename or drop the parameter that a refusal names; return whether to ask again."""
        # Endpoints word a refusal each in their own way: it is searched for the names of our parameters.
        message = f"{getattr(error, 'param', None) or ''} {error} {error.body}"
        with self._lock:
            if options != self._options or limit_name != self._limit_name:
                return True  # another thread adapted the parameters meanwhile
            if "max_completion_tokens" in message and limit_name == "max_tokens":
                self._limit_name = "max_completion_tokens"
                return True
            refused = [name for name in options if name in message]
            for name in refused:
                del self._options[name]
            return bool(refused)

    def _no_answer(self, reason: str) -> UserError:
        return UserError(
            f"--explain.url={self._url} gave no answer after {_RETRIES} retries ({reason}); answers so far are kept: "
            "run the same command again to continue"
        )


def _message(error: Any) -> str:
    # The client tells the reason alone, and of replies in another form than OpenAI's nothing.
    text = str(error) if " - " in str(error) or not error.body else f"{error} - {error.body}"
    return f"status {error.status_code}: {text[:300]}"


def _read_reply(reply: Any, question: Question) -> Answer:
    """Return the answer in a chat completion."""
    choice, usage = reply.choices[0], reply.usage
    text = choice.message.content
    text = replace_surrogates(text) if isinstance(text, str) else text  # no file could hold them
    counts: list[Any] = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    estimate = len(question.task + question.text + str(text or "")) // _LETTERS
    tokens = sum(counts) if all(isinstance(count, int) for count in counts) else estimate
    # A reply that was cut may lack its verdict, and half a verdict can be misread.
    complete = choice.finish_reason not in ("length", "content_filter") and isinstance(text, str)
    return Answer(text if complete else None, tokens)


class Answers:
    """The answers of a model, kept in a folder.

    Args:
      folder: of the answers.
      endpoint: where the model is asked.
      config: its name, the limit of tokens, and how many questions are asked at the same time.
      begin_progress: given what questions are for, returns what is called with the number of answers there are and of
        questions; it may raise to stop.
    """

    def __init__(
        self, folder: Path, endpoint: Endpoint, config: ExplainConfig, begin_progress: Callable[[str], OnProgress]
    ):
        self._path, self._endpoint, self._begin_progress = folder / ANSWERS, endpoint, begin_progress
        self._limit, self._model, self._concurrency = config.most_tokens, config.model, config.concurrency
        self._answers, self._lock = dict[str, Answer](), threading.Lock()
        # By bytes: texts hold Unicode's other line separators, and a killed run may have cut a letter in two.
        for line in self._path.read_bytes().split(b"\n") if self._path.exists() else ():
            try:
                kept = json.loads(line)
            except ValueError:
                continue
            self._answers[kept["question"]] = Answer(kept["answer"], kept["tokens"])

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and replies, of earlier runs, too."""
        return sum(answer.tokens for answer in self._answers.values())

    def all(self, questions: Sequence[Question], label: str) -> list[str | None]:
        """Return the replies to questions, asking the questions that have none yet.

        Raises:
          UserError: the limit of tokens is reached, or the endpoint gives no answers; answers that arrived are kept.
          Interrupted: asked to stop, likewise.
        """
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._answers}
        left, on_progress = list(missing.items()), self._begin_progress(label)
        while left:
            on_progress(len(missing) - len(left), len(missing))
            if self.tokens >= self._limit:
                raise UserError(
                    f"--explain.most_tokens={self._limit}: {self.tokens:,} tokens are spent and {len(left):,} "
                    "questions are left; answers so far are kept: raise the limit and run again"
                )
            self._ask(left[:_LOT], on_progress, len(missing) - len(left), len(missing))
            left = left[_LOT:]
        return [self._answers[key].text for key in keys]

    def _ask(self, lot: Sequence[tuple[str, Question]], on_progress: OnProgress, before: int, total: int) -> None:
        """Ask questions concurrently, and keep each answer as it arrives.

        Args:
          lot: the questions with their keys.
          on_progress: called several times a second with the numbers of answers and questions; may raise
            ``Interrupted``.
          before: answers to earlier questions.
          total: questions in all.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        complete = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        threads = ThreadPoolExecutor(self._concurrency)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("" if complete else "\n")  # end the line that a killed run left incomplete

            def ask(key: str, question: Question) -> None:
                answer = self._endpoint.ask(question)
                line = dict(question=key, text=question.text, answer=answer.text, tokens=answer.tokens)
                # Answers arrive in several threads, and are written in turn.
                with self._lock:
                    self._answers[key] = answer
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()

            waiting, patience = {threads.submit(ask, *item) for item in lot}, TIMEOUT
            try:
                while waiting:
                    done, waiting = wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    on_progress(before + len(lot) - len(waiting), total)
            except Interrupted:
                patience = _LAST
                raise
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                # Answers under way are still kept.
                wait([future for future in waiting if not future.cancelled()], patience)

    def _key(self, question: Question) -> str:
        return fingerprint(dict(model=self._model) | dataclasses.asdict(question))
