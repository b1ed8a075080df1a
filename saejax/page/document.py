"""A report as blocks under headings, written once as an HTML page and once as Markdown.

Every block knows its ``kind``, by which ``page.html.jinja`` lays it out, and its own Markdown. Texts are plain;
escaping happens here and in the template.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from saejax.page.tables import Table, escape_markdown, number, visible


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; ``strong`` sets it off as what a reader should not miss, ``alarm`` in red as what is wrong."""

    text: str
    strong: bool = False
    alarm: bool = False
    kind = "text"

    def markdown(self) -> str:
        text = escape_markdown(self.text)
        return f"> **{text}**" if self.alarm else f"> {text}" if self.strong else text


@dataclasses.dataclass(frozen=True)
class Terms:
    """A list of (term, what it means or what there is to say about it)."""

    items: tuple[tuple[str, str], ...]
    kind = "terms"

    def markdown(self) -> str:
        return "\n".join(f"- **{escape_markdown(term)}**: {escape_markdown(text)}" for term, text in self.items)


@dataclasses.dataclass(frozen=True)
class VerdictBlock:
    """The answer for one behaviour.

    Attributes:
      name: the behaviour.
      anchor: of the section that shows the details.
      yes: whether any answer holds.
      badge: the highest answer that holds, in a word or two.
      answer: the same in a sentence.
      grades: the answers one by one: in words, "yes", "no" or "not known", and the reason.
      measures: what was measured, on the top features and on the random ones; headings first.
      sentences: what else there is to say.
      flag: doubts that go with it, if any.
    """

    name: str
    anchor: str
    yes: bool
    badge: str
    answer: str
    grades: tuple[tuple[str, str, str], ...]
    measures: tuple[tuple[str, str, str], ...]
    sentences: tuple[str, ...]
    flag: str = ""
    kind = "verdict"

    def markdown(self) -> str:
        (_, *headings), *rows = self.measures
        lines = [f"- **{escape_markdown(self.name)}: {escape_markdown(self.badge)}.** {escape_markdown(self.answer)}"]
        lines += [
            f"  - {escape_markdown(words)}: **{said}**: {escape_markdown(reason)}"
            for words, said, reason in self.grades
        ]
        for what, *values in rows:
            shown = "; ".join(f"{heading}: {value}" for heading, value in zip(headings, values, strict=True))
            lines.append(f"  - {escape_markdown(f'{what}; {shown}')}")
        lines += [f"  - {escape_markdown(' '.join(self.sentences))}"]
        if self.flag:
            lines.append(f"  - **Flagged:** {escape_markdown(self.flag)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A saved figure.

    Attributes:
      name: ``figures/<name>.<ending>``.
      svg: for use inside the page.
      caption: what is to be seen, and how to read it.
      alt: the same for someone who cannot see it, with the figures that matter.
      ending: of the file that Markdown shows.
      width: CSS length of a figure that keeps its own size, however wide; "": that of the report's figures.
    """

    name: str
    svg: Markup
    caption: str
    alt: str
    ending: str = "png"
    width: str = ""
    kind = "picture"

    def markdown(self) -> str:
        alt = escape_markdown(self.alt)
        return f"![{alt}](figures/{self.name}.{self.ending})\n\n*{escape_markdown(self.caption)}*"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token of a strip.

    Attributes:
      text: on one line; of nothing but spaces, made visible.
      share: its activation over the feature's largest one, 0 to 1.
      peak: whether it is the context's maximum.
      label: its activation, in words.
    """

    text: str
    share: float
    peak: bool
    label: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One context of a feature in the captured text.

    Attributes:
      document: index of the document in the store.
      position: position of the maximum in it, from 0.
      tokens: the text of each token shown, in order.
      activations: the feature's activation on each; NaN where the store holds no row (an attention sink, or a
        position that was not captured).
      peak: index of the maximum in ``tokens``.
      place: in words, where the maximum stands in the corpus or among the prompts.
    """

    document: int
    position: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    place: str

    @property
    def activation(self) -> float:
        """The activation at the maximum."""
        return self.activations[self.peak]


@dataclasses.dataclass(frozen=True)
class Strips:
    """The contexts of one feature.

    Attributes:
      heading: the feature's number.
      note: figures about it, or why there are no contexts.
      examples: the contexts, strongest first.
    """

    heading: str
    note: str
    examples: tuple[Example, ...]
    kind = "strips"

    def rows(self) -> list[tuple[list[Piece], str]]:
        """For each context its pieces and where it stands."""
        largest = max((example.activation for example in self.examples), default=1.0)
        return [
            (
                [
                    Piece(
                        text=_token(token),
                        share=0.0 if math.isnan(value) else min(max(value / largest, 0.0), 1.0),
                        peak=i == example.peak,
                        label="not scored" if math.isnan(value) else number(value),
                    )
                    for i, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True))
                ],
                f"activation {number(example.activation, 1)}, {example.place}",
            )
            for example in self.examples
        ]

    def markdown(self) -> str:
        lines = []
        for pieces, where in self.rows():
            # Bold as HTML: ** next to spaces or punctuation is not always bold.
            text = "".join(
                f"<b>{escape_markdown(piece.text)}</b>" if piece.peak else escape_markdown(piece.text)
                for piece in pieces
            )
            lines.append(f"  - “{text}” ({escape_markdown(where)})")
        return "\n".join([f"- **{escape_markdown(self.heading)}**: {escape_markdown(self.note)}", *lines])


def _token(text: str) -> str:
    """A token's text on one line; one of nothing but spaces is made visible."""
    text = visible(text)
    return text if text.strip() else "␣" * max(len(text), 1)


@dataclasses.dataclass(frozen=True)
class Code:
    """Text to copy; on the page, folded away unless ``folded`` is False."""

    title: str
    text: str
    folded: bool = True
    kind = "code"

    def markdown(self) -> str:
        fence = "```"
        while fence in self.text:
            fence += "`"
        return f"{escape_markdown(self.title)}:\n\n{fence}\n{self.text}\n{fence}"


@dataclasses.dataclass(frozen=True)
class Links:
    """Other files of the workdir.

    Attributes:
      title: what they are; "": nothing to be said.
      items: (text, address relative to the report's folder, percent-encoded).
    """

    title: str
    items: tuple[tuple[str, str], ...]
    kind = "links"

    def markdown(self) -> str:
        links = [f"- [{escape_markdown(text)}]({address})" for text, address in self.items]
        return "\n".join(([f"{escape_markdown(self.title)}:", ""] if self.title else []) + links)


Block = Text | Terms | VerdictBlock | Picture | Strips | Code | Table | Links


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, of level 2 or 3, and what stands under it; perhaps a paragraph for the beginning of the report."""

    title: str
    blocks: tuple[Block, ...]
    level: int = 2
    lead: str = ""

    @property
    def anchor(self) -> str:
        """Its address on the page."""
        return anchor(self.title)


def anchor(title: str) -> str:
    """The address of a section: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def to_html(title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """The page, complete in itself: no script, no outside resource; ``Links`` lead to other files of the workdir."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saejax.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_bind,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["runs"] = _runs
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, lead=lead, sections=sections, footer=footer)


def _bind(value: Any) -> Any:
    """Keeps a percent sign on the line of its number, in plain text."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", value) if type(value) is str else value


def _runs(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Neighbouring blocks of one kind together, with their kind."""
    return [(kind, list(run)) for kind, run in itertools.groupby(blocks, key=lambda block: block.kind)]


def to_markdown(title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """The same content in Markdown; figures are links into ``figures/``."""
    parts = [f"# {escape_markdown(title)}", *map(escape_markdown, lead)]
    for section in sections:
        parts.append(f"{'#' * section.level} {escape_markdown(section.title)}")
        parts += [block.markdown() for block in section.blocks]
    return "\n\n".join([*parts, "---", escape_markdown(footer)]) + "\n"
