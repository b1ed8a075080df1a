"""Texts to track: prompts and worked solutions, their tokens, and the sentences that are their steps."""

import dataclasses
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from saejax.dictionaries.names import folder_name
from saejax.errors import UserError
from saejax.matching.track.results import TrackedStep
from saejax.matching.track.settings import TrackConfig
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import token_text
from saejax.tasks.answer_tokens import answer_ids
from saejax.tasks.files import decode, read_bytes, read_lines

MOST = 4  # texts side by side
_EXAMPLE = '{"slug": "apples", "prompt": "Ann has 3 apples ...", "solution": "She buys 4. ...", "answer": " 7"}'
_NAMED = 40  # characters of a text that its name shows
_KEYS = ("slug", "prompt", "solution", "answer")
_GSM8K = {"question", "answer"}  # its fields: the answer is the solution, and ends in "#### 7"
# Words whose full stop ends no sentence, and initials such as "J.".
_ABBREVIATION = re.compile(
    r"""(?:^|[\s(“"'])(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Mt|No|Fig|Eq|vs|etc|approx|ca|cf|"""
    r"""e\.g|i\.e|a\.m|p\.m|U\.S|[A-Z])\.\s*$"""
)
# Of a word or number in a script that puts spaces between words: Chinese, Japanese, Thai and others do not.
_IN_WORD = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE = re.compile(r"""(?:[.!?…؟।]+["'”’)\]]*(?=\s)|[。！？]+["'”’)\]」』]*|(?=\n))\s*""")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A text to follow."""

    slug: str  #: its name
    prompt: str  #: the text before the solution; without a solution its sentences are the steps
    #: texts of the solution's steps, which stand one after the other; none without a solution.
    steps: tuple[str, ...] = ()
    answer: str = ""  #: as it is written; "": the model's most probable next token
    output: str = ""  #: what the model writes after the prompt; "": it was not asked to


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """A text as the model reads it."""

    problem: Problem  #: the text
    ids_T: np.ndarray  #: token ids; ``tokens``: their texts
    tokens: tuple[str, ...]
    segments: tuple[TrackedStep, ...]  #: its parts, which cover all tokens; ``first``: which of them is the first step
    first: int
    answer: int | None  #: id of the answer's first token, None where the model's own most probable token is meant
    position: int  #: where the answer is the next token

    @property
    def steps(self) -> tuple[TrackedStep, ...]:
        """The segments that are steps."""
        return self.segments[self.first :]

    @property
    def segment_T(self) -> np.ndarray:
        """The segment that each token belongs to."""
        return np.repeat(np.arange(len(self.segments)), [part.stop - part.start for part in self.segments])


def sentences(text: str) -> tuple[str, ...]:
    """Return the sentences of a text, each with the space after it; joined they are the text.

    A sentence ends at a mark such as ``.`` before a space, at 。 and the like, or at a line end. Abbreviations such as
    "Dr." end none, and a number alone ("2. ") belongs to the next sentence.
    """
    ends = [match.end() for match in _SENTENCE.finditer(text) if match.end() > match.start()]
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if end > start]
    joined: list[str] = []
    for part in parts:
        if joined and (not part.strip() or _continues(joined[-1])):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def _continues(part: str) -> bool:
    """Return whether a sentence goes on after a part of a text that ends in a mark."""
    if part.endswith("\n"):
        return bool(re.fullmatch(r"\W*\d{0,3}\W*", part))
    return bool(re.fullmatch(r"\W*\d{0,3}\W*", part) or _ABBREVIATION.search(part))


def name_text(text: str) -> str:
    """Return a name of a text: its words, or their beginning, with a hash where they do not tell all of it."""
    name = folder_name(text[:_NAMED])
    if name.replace("-", " ") == text:
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def read_problems(config: TrackConfig) -> list[Problem]:
    """Return the texts that flags ask for, with distinct names.

    Raises:
      UserError: the file cannot be read, a line is no such text, there are more than four, or a step is empty.
    """
    if not config.prompts:
        return [Problem(name_text(config.prompt), config.prompt)]
    path, problems = Path(config.prompts), dict[str, Problem]()
    text = decode(read_bytes(path, "--track.prompts", "name a file of prompts"), path)

    def read(record: Any, where: str) -> None:
        """Keep a line if it is a text."""
        problem = _problem(record, where)
        if problem.slug.lower() in map(str.lower, problems):  # some disks take names that differ in case for one
            raise UserError(f"{where} has the slug {problem.slug!r} of an earlier line")
        problems[problem.slug] = problem

    read_lines(text, path, _EXAMPLE, read)
    if not 1 <= len(problems) <= MOST:
        raise UserError(
            f"--track.prompts={path} holds {len(problems)} prompts: expected 1 to {MOST}, shown side by side"
        )
    return list(problems.values())


def _problem(record: Any, where: str) -> Problem:
    if isinstance(record, dict) and set(record) == _GSM8K:
        record = _from_gsm8k(record, where)
    keys_fit = isinstance(record, dict) and not set(record) - set(_KEYS)
    if not keys_fit or not isinstance(record.get("prompt", ""), str) or not isinstance(record.get("answer", ""), str):
        raise UserError(f"{where} is no prompt to follow: expected {_EXAMPLE}")
    solution, prompt = record.get("solution", ""), record.get("prompt", "")
    if not (isinstance(solution, str) or (isinstance(solution, list) and all(isinstance(s, str) for s in solution))):
        raise UserError(f"{where}: the solution is neither a text nor a list of texts: expected {_EXAMPLE}")
    steps = sentences(solution) if isinstance(solution, str) else tuple(solution)
    for number, step in enumerate(steps, 1):
        if not step.strip():
            raise UserError(f"{where}: step {number} of the solution is empty: expected a text for each step")
    if not prompt.strip() and not steps:
        raise UserError(f"{where}: the prompt is empty: expected {_EXAMPLE}")
    slug = folder_name(str(record["slug"])) if record.get("slug") else name_text(prompt or steps[0])
    return Problem(slug, prompt, steps, record.get("answer", ""))


def _from_gsm8k(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row of GSM8K as a prompt to follow: calculator annotations are removed, the answer follows the steps."""
    solution, mark, answer = str(record["answer"]).rpartition("####")
    if not mark or not answer.strip():
        raise UserError(
            f"{where}: 'answer' does not end in '#### ' and a number, as in GSM8K: expected that, or {_EXAMPLE}"
        )
    solution = re.sub(r"<<[^>]*>>", "", solution)
    steps = f"{solution.rstrip()}\nThe answer is {answer.strip()}."
    return dict(prompt=record["question"], solution=steps, answer=f" {answer.strip()}")


def write_solution(lm: LanguageModel, problem: Problem, tokens: int) -> Problem:
    """Return a problem with what the model writes after its prompt, the most probable token each time.

    Where the problem has no solution, the sentences of the output are the steps, and where it has no answer either, the
    last number in the output is the answer.

    Args:
      lm: the model.
      problem: the problem; one without a prompt is returned as it is.
      tokens: tokens that are written at most; 0: none.

    Raises:
      UserError: the prompt and ``tokens`` do not fit into the model's context.
    """
    if not tokens or not problem.prompt.strip():
        return problem
    (written,) = lm.generate(lm.tokenize([problem.prompt]), tokens)
    problem, output = dataclasses.replace(problem, output=written.text.strip()), written.text
    if problem.steps or not output.strip():
        return problem
    numbers = _NUMBER.findall(output)
    return dataclasses.replace(
        problem, steps=sentences(output.rstrip()), answer=problem.answer or (f" {numbers[-1]}" if numbers else "")
    )


def encode(lm: LanguageModel, problem: Problem) -> EncodedText:
    """Return the tokens of a text, and the steps that they belong to.

    Raises:
      UserError: the text is longer than the model's context, a step has no token of its own, or the answer cannot be
        followed.
    """
    steps = problem.steps or sentences(problem.prompt)
    parts = [(f"step {number}", step) for number, step in enumerate(steps, 1)]
    if problem.steps and problem.prompt.strip():
        parts.insert(0, ("prompt", problem.prompt))
    # Steps are joined to one text before it is split into tokens: pieces by themselves would have other tokens.
    for place, ((name, text), (_, following)) in enumerate(itertools.pairwise(parts)):
        if not text[-1:].isspace() and not following[:1].isspace():
            parts[place] = name, f"{text} "
    whole = "".join(text for _, text in parts)
    ids_T = lm.tokenize([whole]).ids_BxT[0]
    ends_T = _ends(lm.tokenizer, whole, len(ids_T))
    bounds = np.cumsum([len(text) for _, text in parts])
    # Accumulated, because the search for where steps start needs rising numbers.
    of_T = np.minimum(np.searchsorted(bounds, np.maximum.accumulate(ends_T), side="left"), len(parts) - 1)
    starts = np.searchsorted(of_T, np.arange(len(parts) + 1))
    starts[0] = 0
    for (name, text), start, stop in zip(parts, starts, starts[1:], strict=False):
        if start == stop:
            raise UserError(f"{problem.slug}: {name} ({text.strip()!r}) has no token of its own: join it with another")
    segments = tuple(
        TrackedStep(name, text.strip(), int(start), int(stop))
        for (name, text), start, stop in zip(parts, starts, starts[1:], strict=False)
    )
    first = int(parts[0][0] == "prompt")
    answer, position = _answer(lm.tokenizer, problem, whole, int(bounds[0]) if first else 0, ids_T, ends_T)
    as_text = token_text(lm.tokenizer)
    tokens = tuple(as_text(int(token)) for token in ids_T)
    return EncodedText(problem, ids_T, tokens, segments, first, answer if answer is None else int(answer), position)


def _ends(tokenizer: Any, text: str, count: int) -> np.ndarray:
    """Return where each token's characters end; 0 for special tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "the model's tokenizer does not say which characters a token stands for, so steps cannot be separated: use "
            "a fast tokenizer"
        )
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return np.array([0] * (count - len(read)) + [end for _, end in read], np.int64)


def _answer(
    tokenizer: Any, problem: Problem, text: str, solution: int, ids_T: np.ndarray, ends_T: np.ndarray
) -> tuple[int | None, int]:
    """Return the id of the answer's first token and the position before it.

    The answer is followed at its last occurrence in the solution, from the character ``solution`` on, as a whole word
    or number (" 12" is not in "1200"), or where there is none at the text's end.
    """
    last = len(ends_T) - 1
    answer = problem.answer
    if not answer:
        return None, last
    word = answer.strip()
    # Not inside a word, nor before or after the rest of a number: "12" in "1200", "12.5", "3,012" or "112".
    whole = re.compile(rf"(?<!{_IN_WORD})(?<!\d[.,]){re.escape(word)}(?!{_IN_WORD})(?![.,]\d)")
    # The last occurrence, as worked solutions end in their answer and may name the number on the way.
    places = [match.start() for match in whole.finditer(text, solution)] if problem.steps and word else []
    if places:
        token = int(np.searchsorted(ends_T, places[-1], side="right"))
        if token > 0:
            return int(ids_T[token]), token - 1
    kept = text.rstrip() if answer[:1].isspace() else text
    if kept != text:
        raise UserError(f"{problem.slug}: the text ends in a space and the answer {answer!r} begins with one: drop one")
    return answer_ids(tokenizer, text, answer)[0], last
