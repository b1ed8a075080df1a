"""What a language model is asked about features, and how its answers are read.

The questions are those of EleutherAI's delphi (Paulo et al., 2024, arXiv 2410.13928; intruder: arXiv 2507.08473), in
words of our own: a label is written from contexts in which the active tokens are marked; *detection* asks in which of
some contexts the feature of that label is active; *fuzzing*, in which of them the right tokens are marked; *intruder*
shows no label and asks which context does not belong to the others; *embedding* asks nothing: texts that are closer to
the label are said to be the feature's. An answer that is not as asked for is None, and counts as unread.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from saejax.interpret.feature_record import FeatureContext

MARKED = 0.3  # of a context's largest activation: tokens that reach it are marked
GROUP = 5  # contexts of a question
_LONGEST = 300  # characters of a label
_WRITTEN, _JUDGED = 200, 40  # new tokens of an answer, at most

_EXPLAIN = """A feature of a language model is active on some tokens of a text and silent on all others. You are \
shown pieces of text in which one feature is active; the active tokens stand between << and >>. Say in a short phrase \
what these tokens, in their contexts, have in common: be specific, leave out the marks, and do not list the examples. \
End with one line of the form
[EXPLANATION]: the phrase"""
_DETECT = """A feature of a language model is active on some pieces of text. You are given a description of the \
feature and numbered texts. For each text say whether the feature is active somewhere in it: 1 for yes, 0 for no. \
Answer with a JSON list of {count} numbers, such as {example}, and nothing else."""
_FUZZ = """A feature of a language model is active on some tokens. You are given a description of the feature and \
numbered texts with tokens marked by << and >>. For each text say whether the marked tokens are those on which the \
feature is active: 1 for yes, 0 for no. Answer with a JSON list of {count} numbers, such as {example}, and nothing \
else."""
_SEEK = "Instruct: Find pieces of text in which what is described occurs\nQuery: "
_INTRUDE = """You are shown numbered texts with tokens marked by << and >>. In all of them but one the marked tokens \
have something in common. Find the one that does not belong to the others. End with one line of the form
[RESPONSE]: its number"""


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
      task: the instruction.
      text: what it is about.
      most: new tokens of the answer, at most.
    """

    task: str
    text: str
    most: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """One message: some templates have no place for a system's."""
        return [dict(role="user", content=f"{self.task}\n\n{self.text}")]


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
    """Labels and texts whose embeddings are compared; the answer is a JSON list of cosines with all texts, per label.

    Attributes:
      model: that embeds them.
      labels, texts: as they are embedded.
    """

    model: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    task, most = "", 0

    @property
    def text(self) -> str:
        """All that is embedded."""
        return "\n".join((*self.labels, *self.texts))


def compare(model: str, labels: Sequence[str], contexts: Sequence[FeatureContext]) -> EmbeddingRequest:
    """Compares labels, as instructed queries, with contexts without marks."""
    return EmbeddingRequest(model, tuple(_SEEK + _clean(label) for label in labels), tuple(map(plain, contexts)))


def plain(context: FeatureContext) -> str:
    """A context as text."""
    return _clean("".join(context["tokens"]))


def marked(context: FeatureContext, places: Sequence[int]) -> str:
    """A context with tokens between << and >>, neighbours together."""
    text, inside = "", False
    for place, token in enumerate([*context["tokens"], ""]):
        if (place in places) != inside:
            text, inside = text + ("<<" if not inside else ">>"), not inside
        text += token
    return _clean(text)


def active(context: FeatureContext) -> list[int]:
    """The places of a context at which the feature has at least ``MARKED`` of its largest activation there."""
    acts = [act or 0.0 for act in context["acts"]]
    return [place for place, act in enumerate(acts) if act > 0 and act >= MARKED * max(acts)]


def explain(contexts: Sequence[FeatureContext], raised: Sequence[str]) -> Question:
    """Asks for a label.

    Args:
      contexts: in which the feature is active.
      raised: tokens that it makes more likely, if they are known.
    """
    text = _numbered([marked(context, active(context)) for context in contexts])
    said = f"\n\nTokens that the feature makes more likely: {json.dumps(list(map(_clean, raised)), ensure_ascii=False)}"
    return Question(_EXPLAIN, text + (said if raised else ""), _WRITTEN)


def detect(label: str, contexts: Sequence[FeatureContext]) -> Question:
    """Asks in which contexts the feature of a label is active."""
    return _judged(_DETECT, label, list(map(plain, contexts)))


def fuzz(label: str, contexts: Sequence[FeatureContext], places: Sequence[Sequence[int]]) -> Question:
    """Asks whether the tokens at ``places`` of each context are those that a label speaks of."""
    return _judged(_FUZZ, label, [marked(*one) for one in zip(contexts, places, strict=True)])


def intrude(contexts: Sequence[FeatureContext], places: Sequence[Sequence[int]]) -> Question:
    """Asks which context, with tokens marked at ``places``, does not belong to the others."""
    return Question(_INTRUDE, _numbered([marked(*one) for one in zip(contexts, places, strict=True)]), _WRITTEN)


def read_label(answer: str | None) -> str | None:
    """The label in an answer."""
    found = re.findall(r"\[EXPLANATION\]:[ \t]*(\S.*)", answer or "")
    return found[-1].strip().strip("*").strip()[:_LONGEST] or None if found else None


def read_judgements(answer: str | None, count: int) -> list[bool] | None:
    """The yes and no of an answer: its first list, if that has ``count`` numbers, all 0 or 1."""
    found = re.search(r"\[[^\[\]]*\]", answer or "")
    try:
        numbers = json.loads(found[0]) if found else None
    except json.JSONDecodeError:
        return None
    if not isinstance(numbers, list) or len(numbers) != count or any(number not in (0, 1) for number in numbers):
        return None
    return [bool(number) for number in numbers]


def read_cosines(answer: str | None) -> list[list[float]]:
    """The cosines of each label with all texts."""
    return json.loads(answer or "[]")


def read_choice(answer: str | None, count: int) -> int | None:
    """The place of the context that an answer names."""
    found = re.findall(r"\[RESPONSE\]:\s*(\d+)", answer or "")
    return int(found[-1]) - 1 if found and 1 <= int(found[-1]) <= count else None


def _judged(task: str, label: str, texts: Sequence[str]) -> Question:
    example = json.dumps([number % 2 for number in range(len(texts))])
    return Question(
        task.format(count=len(texts), example=example), f"Description: {label}\n\n{_numbered(texts)}", _JUDGED
    )


def _numbered(texts: Sequence[str]) -> str:
    return "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(texts, 1))


def _clean(text: str) -> str:
    """Text without half characters, which tokens may be."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
