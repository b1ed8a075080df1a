"""Questions to a language model about features, and how its replies are parsed.

The questions follow EleutherAI's delphi (Paulo et al., 2024, arXiv 2410.13928), in our own words. *Explanation*:
write a label from contexts in which the active tokens are marked. *Detection*: in which contexts does the feature with
this label fire? *Fuzzing*: are the marked tokens those on which it fires? *Intruder*: which of some marked contexts
does not belong to the others, no label shown? *Simulation*: how active is it on each token? A reply that cannot be
parsed counts as unparsed and nowhere else.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from saejax.interpret.feature_record import FeatureContext
from saejax.unicode import replace_surrogates

MARKED = 0.3  # of a context's largest activation: tokens that reach it are marked
GROUP = 5  # contexts in a question
STRONGEST = 10  # activation that a simulation gives the strongest firing
_LONGEST = 300  # characters of a label
_VALUES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_EXPLAIN = """A feature of a language model is active on some tokens of a text and silent on all others. You are \
shown pieces of text in which one feature is active; the active tokens stand between << and >>. Say in a short phrase \
what these tokens, in their contexts, have in common: be specific, leave out the marks, and do not list the examples. \
End with one line of the form
[EXPLANATION]: the phrase"""
_DETECT = """A feature of a language model is active on some pieces of text. You are given a description of the \
feature and numbered texts. For each text say whether the feature is active somewhere in it: 1 for yes, 0 for no. \
Answer with a JSON list of {count} numbers, such as {example}, and nothing else."""
_FUZZ = """A feature of a language model is active on some tokens of a text and silent on all others. You are given a \
description of the feature and numbered texts in which some tokens stand between << and >>. For each text say whether \
the marked tokens are those on which the feature is active: 1 for yes, 0 for no. Answer with a JSON list of {count} \
numbers, such as {example}, and nothing else."""
_INTRUDE = """You are shown numbered texts in which some tokens stand between << and >>. In all of them but one, the \
same feature of a language model is active on the marked tokens. Say which text does not belong to the others. End \
with one line of the form
[RESPONSE]: the number of the text"""
_SIMULATE = """A feature of a language model is active on some tokens of a text and silent on all others. You are \
given a description of the feature, a text, and its tokens as a JSON list. Predict the activation of the feature on \
each token as a whole number from 0 (silent) to {most} (as strong as it gets). Answer with a JSON list of {count} \
numbers and nothing else."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question."""

    task: str  #: the instruction
    text: str  #: the material

    @property
    def messages(self) -> list[dict[str, str]]:
        """One user message: some templates refuse a system message."""
        return [dict(role="user", content=f"{self.task}\n\n{self.text}")]


def _plain(context: FeatureContext) -> str:
    """Return a context as text."""
    return replace_surrogates("".join(context["tokens"]))


def active_tokens(context: FeatureContext) -> list[bool]:
    """Return which tokens of a context have at least ``MARKED`` of its largest activation."""
    acts = [act or 0.0 for act in context["acts"]]
    return [act > 0 and act >= MARKED * max(acts) for act in acts]


def _marked(context: FeatureContext, is_marked: Sequence[bool]) -> str:
    """Return a context with some of its tokens between << and >>."""
    text, inside = "", False
    # A last token of no text ends a pair of marks; neighbours share one.
    for token, is_here in zip([*context["tokens"], ""], [*is_marked, False], strict=True):
        if is_here != inside:
            text, inside = text + ("<<" if not inside else ">>"), not inside
        text += token
    return replace_surrogates(text)


def explain(contexts: Sequence[FeatureContext], promoted: Sequence[str]) -> Question:
    """Return the question that asks for a feature's label.

    Args:
      contexts: contexts in which the feature fires.
      promoted: tokens that it makes more likely; empty: unknown.
    """
    text = _numbered([_marked(context, active_tokens(context)) for context in contexts])
    listed = json.dumps(list(map(replace_surrogates, promoted)), ensure_ascii=False)
    text += f"\n\nTokens that the feature makes more likely: {listed}" if promoted else ""
    return Question(_EXPLAIN, text)


def detect(label: str, contexts: Sequence[FeatureContext]) -> Question:
    """Return the question in which contexts the feature with a label fires."""
    return _ask_each(_DETECT, label, list(map(_plain, contexts)))


def fuzz(label: str, contexts: Sequence[FeatureContext], marks: Sequence[Sequence[bool]]) -> Question:
    """Return the question in which contexts the feature with a label marks the tokens."""
    return _ask_each(_FUZZ, label, list(map(_marked, contexts, marks)))


def intrude(contexts: Sequence[FeatureContext], marks: Sequence[Sequence[bool]]) -> Question:
    """Return the question which of some marked contexts does not belong to the others."""
    return Question(_INTRUDE, _numbered(list(map(_marked, contexts, marks))))


def simulate(label: str, context: FeatureContext) -> Question:
    """Return the question how active the feature with a label is on each token of a context."""
    task = _SIMULATE.format(count=len(context["tokens"]), most=STRONGEST)
    tokens = json.dumps(list(map(replace_surrogates, context["tokens"])), ensure_ascii=False)
    return Question(task, f"Description: {label}\n\nText 1: {_plain(context)}\n\nTokens: {tokens}")


def _ask_each(task: str, label: str, texts: Sequence[str]) -> Question:
    """Return a question with a yes or no for each of some texts."""
    example = json.dumps([number % 2 for number in range(len(texts))])
    return Question(task.format(count=len(texts), example=example), f"Description: {label}\n\n{_numbered(texts)}")


def read_label(reply: str | None) -> str | None:
    """Return the label in a reply; None: there is none."""
    label = _read_field(reply, "EXPLANATION")
    return label[:_LONGEST] if label else None


def read_judgements(reply: str | None, count: int) -> list[bool] | None:
    """Return the yes and no of a reply; None: unparsed.

    Read is the last list of ``count`` values 0, 1, true, false, yes or no; failing that, the last such object, a line
    "Text N: 0 or 1" for each text, or a reply of such numbers alone.
    """
    text = _without_thinking(reply).lower()
    for pattern in (r"\[([^\[\]]*)\]", r"\{([^{}]*)\}"):
        for listed in reversed(re.findall(pattern, text)):
            # Not as JSON: models quote numbers, and leave a comma at the end.
            items = [item.rpartition(":")[2].strip(" \n\t\"'`*") for item in listed.strip(" \n\t,").split(",")]
            if len(items) == count and all(item in _VALUES for item in items):
                return [_VALUES[item] for item in items]
    lines = re.findall(r"^\W*text\s*(\d+)\W+(\w+)\W*$", text, re.MULTILINE)
    if [int(number) for number, _ in lines] == list(range(1, count + 1)) and all(item in _VALUES for _, item in lines):
        return [_VALUES[item] for _, item in lines]
    alone = re.findall("[01]", text)
    return [item == "1" for item in alone] if len(alone) == count and re.fullmatch(r"[\W01]+", text) else None


def read_choice(reply: str | None, count: int) -> int | None:
    """Return which of ``count`` texts a reply names, counted from 0; None: unparsed."""
    named = _read_field(reply, "RESPONSE") or _without_thinking(reply)
    number = re.fullmatch(r"\W*(?:text)?\W*(\d+)\W*", named.strip(), re.IGNORECASE)
    return int(number[1]) - 1 if number and 1 <= int(number[1]) <= count else None


def read_activations(reply: str | None, count: int) -> list[float] | None:
    """Return the last list of ``count`` numbers from 0 to ``STRONGEST`` in a reply; None: unparsed."""
    for listed in reversed(re.findall(r"\[([^\[\]]*)\]", _without_thinking(reply))):
        items = [item.strip(" \n\t\"'") for item in listed.strip(" \n\t,").split(",")]
        if len(items) == count and all(re.fullmatch(r"\d+(\.\d+)?", item) for item in items):
            values = list(map(float, items))
            return values if max(values) <= STRONGEST else None
    return None


def _read_field(reply: str | None, name: str) -> str | None:
    """Return the last value after "[NAME]:", whatever Markdown surrounds name or value; None: there is none."""
    mark, text = r"[\s*_`]*", _without_thinking(reply)
    values: list[str] = []
    for before, after in ((r"\[", r"\]"), ("", "")):  # in brackets first: the word may also stand in a sentence
        pattern = rf"{mark}{before}\b{name}\b{after}{mark}:{mark}(\S.*)"
        values = values or re.findall(pattern, text, re.IGNORECASE)
    return values[-1].strip().strip("*_`").strip() or None if values else None


def _without_thinking(reply: str | None) -> str:
    """Return a reply without the reasoning before it; empty if the reasoning never ended."""
    text = (reply or "").rpartition("</think>")[2]
    return "" if "<think>" in text else text


def _numbered(texts: Sequence[str]) -> str:
    return "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(texts, 1))
