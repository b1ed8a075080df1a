"""Language models that answer questions: an OpenAI-compatible endpoint, or a model on this machine's devices.

Answers are kept in ``answers.jsonl`` as they arrive, so that no question is paid for twice. It has a line for each: a
hash of model and question, the question's text, the answer and its token counts. A last line that a killed run left
incomplete is ignored.
"""

import concurrent.futures
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.interpret.questions import Question
from saejax.models.loading import load_model
from saejax.models.tokens import pad
from saejax.runner.parts import Progress
from saejax.runner.workspace import Run, fingerprint
from saejax.stages.explain import ExplainConfig

KEY = "OPENAI_API_KEY"
AT_ONCE = 8  # questions that are asked at the same time: few endpoints refuse as many
TIMEOUT = 120.0  # seconds for an answer: a model that reasons takes a minute
MAX_TOKENS = 4096  # of an answer of an endpoint, whose model may reason first; a longer one is not used
_RETRIES = 5  # with the client's waits: as the server asks (Retry-After), or 0.5 to 8 s, doubling
_LETTERS = 4  # characters per token, where the endpoint reports no usage
ANSWERS = "answers.jsonl"
_LOT = 64  # questions handed over together; a run can stop between two such lots
_ESTIMATED_LETTERS = 3  # characters per token, for estimates before asking
_REPLY = 200  # tokens of a reply, for these estimates
_NO_THINKING = dict(enable_thinking=False)  # Qwen3 and others; templates without the variable ignore it


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer."""

    text: str | None  #: the reply; None: there was none, or it was truncated
    tokens: tuple[int, int]  #: number of tokens of the prompt and of the reply


OnAnswer = Callable[[int, Answer], None]  # (number of the question, its answer)


class Endpoint:
    """An OpenAI-compatible endpoint, asked through OpenAI's client, which retries what may succeed later.

    Models differ in the parameters they take. The first request has temperature 0, ``max_tokens`` and no thinking; a
    parameter that the endpoint names in a status 400 is renamed or dropped, for all later questions too.

    Args:
      url: address, up to ``/v1``.
      model: the model's name there.
      at_once: concurrent questions.
      timeout: longest time for an answer, in seconds.

    Raises:
      UserError: the address is not a URL, or the client is not installed.
    """

    def __init__(self, url: str, model: str, at_once: int = AT_ONCE, timeout: float = TIMEOUT):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--explain.url={url} is not a URL: expected one such as http://localhost:8000/v1")
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"--explain.url needs OpenAI's client, which cannot be imported ({error}): pip install openai"
            ) from error
        self._openai, self._url, self._model, self._at_once = openai, url, model, at_once
        key = os.environ.get(KEY) or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=_RETRIES)
        self._lock = threading.Lock()
        self._limit_name = "max_tokens"
        self._options: dict[str, Any] = dict(temperature=0, chat_template_kwargs=_NO_THINKING)

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Ask questions concurrently; call ``on_answer`` with each answer as it arrives, one call at a time.

        Raises:
          UserError: the endpoint refuses a question, or gives no answer after all retries.
        """

        def answer(number: int) -> None:
            reply = self._answer(questions[number])
            # Callers write answers to a file: they arrive from several threads, but are handed on in turn.
            with self._lock:
                on_answer(number, reply)

        with concurrent.futures.ThreadPoolExecutor(self._at_once) as threads:
            waiting = [threads.submit(answer, number) for number in range(len(questions))]
            try:
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
            finally:
                threads.shutdown(cancel_futures=True)  # answers under way are still kept

    def _answer(self, question: Question) -> Answer:
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
            except openai.BadRequestError as error:
                if not self._adapt(error, options, limit_name):
                    raise UserError(f"{self._url} refuses the question: {_message(error)}") from None
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    key = f"; check the environment variable {KEY}" if error.status_code in (401, 403) else ""
                    raise UserError(f"{self._url} refuses the question: {_message(error)}{key}") from None
                raise self._no_answer(_message(error)) from None
            except openai.APIError as error:  # connections, time limits, replies that are not JSON
                raise self._no_answer(str(error) or type(error).__name__) from None
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise self._no_answer(f"its reply is no chat completion ({type(error).__name__})") from None

    def _adapt(self, error: Any, options: dict[str, Any], limit_name: str) -> bool:
        """Rename or drop the parameter that a refusal names; return whether to ask again."""
        message = f"{getattr(error, 'param', None) or ''} {_message(error)}"
        with self._lock:
            # Endpoints name a parameter that they refuse in words, each in its own: the refusal is searched for known
            # names.
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
    return f"status {error.status_code}: {str(error)[:300]}"


def _read_reply(reply: Any, question: Question) -> Answer:
    """Return the answer in a chat completion."""
    choice, usage = reply.choices[0], reply.usage
    text = choice.message.content
    prompt_tokens = usage.prompt_tokens if usage else len(question.task + question.text) // _LETTERS
    answer_tokens = usage.completion_tokens if usage else len(text or "") // _LETTERS
    # A reply cut at the limit may lack its verdict, and half a verdict can be misread.
    complete = choice.finish_reason != "length" and isinstance(text, str)
    return Answer(text if complete else None, (prompt_tokens, answer_tokens))


class LocalJudge:
    """A language model that answers greedily in its chat template, without thinking.

    Raises:
      UserError: the model cannot be loaded, or its tokenizer has no chat template.
    """

    def __init__(self, path: str, mesh: Mesh):
        self._lm = load_model(path, mesh=mesh)
        if not getattr(self._lm.tokenizer, "chat_template", None):
            raise UserError(
                f"--explain.model={path} has no chat template, as base models do not: name a model that chats"
            )

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Ask questions; call ``on_answer`` with each answer. A question that exceeds the context has none."""
        ids = [self._token_ids(question) for question in questions]
        context = self._lm.config.context
        fits = [n for n in range(len(ids)) if len(ids[n]) + questions[n].short_tokens <= context]
        for number in sorted(set(range(len(ids))) - set(fits)):
            on_answer(number, Answer(None, (0, 0)))
        order = sorted(fits, key=lambda n: (questions[n].short_tokens, len(ids[n])))  # similar ones share a batch
        for start in range(0, len(order), AT_ONCE):
            batch = order[start : start + AT_ONCE]
            longest = max(len(ids[n]) for n in batch)
            most = min(max(questions[n].short_tokens for n in batch), context - longest)
            for n, generated in zip(batch, self._lm.generate(pad([ids[n] for n in batch]), most), strict=True):
                text = None if generated.finished == "length" else generated.text
                on_answer(n, Answer(text, (len(ids[n]), len(generated.ids))))

    def _token_ids(self, question: Question) -> list[int]:
        tokenizer = self._lm.tokenizer
        text = tokenizer.apply_chat_template(
            question.messages, tokenize=False, add_generation_prompt=True, **_NO_THINKING
        )
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class Judge(Protocol):
    """A language model that answers questions."""

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Call ``on_answer`` with the number of each question and its answer."""
        ...


class Answers:
    """The answers of a model, kept in a folder."""

    def __init__(self, run: Run, folder: Path, judge: Judge):
        self._run, self._path, self._judge = run, folder / ANSWERS, judge
        self._limit, self._model = run.configs[ExplainConfig].most_tokens, run.configs[ExplainConfig].model
        self._answers: dict[str, Answer] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            try:
                kept = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._answers[kept["question"]] = Answer(kept["answer"], tuple(kept["tokens"]))

    @property
    def spent(self) -> tuple[int, int]:
        """Tokens of all prompts and of all replies, those of earlier runs included."""
        tokens = [answer.tokens for answer in self._answers.values()]
        return sum(prompt for prompt, _ in tokens), sum(reply for _, reply in tokens)

    def __len__(self) -> int:
        return len(self._answers)

    def all(self, questions: Sequence[Question], label: str) -> list[str | None]:
        """Return the replies to questions, asking those that have none yet.

        Raises:
          UserError: the limit of tokens is reached, or the judge gives no answers; those that arrived are kept.
          Interrupted: asked to stop, likewise.
        """
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._answers}
        left, on_progress = list(missing.items()), Progress(self._run, "answers").of_part(label, 0)
        while left:
            on_progress(len(missing) - len(left), len(missing))
            lot = left[: self._affordable([question for _, question in left[:_LOT]])]
            if not lot:
                raise UserError(
                    f"--explain.most_tokens={self._limit}: {sum(self.spent):,} tokens are spent and {len(left):,} "
                    f"questions of about {sum(_estimate_tokens(question) for _, question in left):,} tokens are left; "
                    "answers so far are kept: raise the limit and run again"
                )
            self._ask(lot)
            left = left[len(lot) :]
        return [self._answers[key].text for key in keys]

    def _affordable(self, questions: Sequence[Question]) -> int:
        """Return how many of the first questions the limit has room for."""
        room = self._limit - sum(self.spent)
        for count, question in enumerate(questions):
            room -= _estimate_tokens(question)
            if room < 0:
                return count
        return len(questions)

    def _ask(self, lot: Sequence[tuple[str, Question]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        complete = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("" if complete else "\n")  # end the line that a killed run left incomplete

            def keep(number: int, answer: Answer) -> None:
                key, question = lot[number]
                self._answers[key] = answer
                line = dict(question=key, text=question.text, answer=answer.text, tokens=answer.tokens)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            self._judge.ask([question for _, question in lot], keep)

    def _key(self, question: Question) -> str:
        return fingerprint(dict(model=self._model) | dataclasses.asdict(question))


def _estimate_tokens(question: Question) -> int:
    """Return roughly the tokens of a question and its reply."""
    return len(question.task + question.text) // _ESTIMATED_LETTERS + _REPLY
