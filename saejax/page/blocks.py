"""The blocks of a report: each knows its ``kind``, which ``page.html.jinja`` reads, and its own Markdown.

Texts are plain; escaping happens here for Markdown, and in the template for HTML.
"""

import dataclasses

from markupsafe import Markup

from saejax.page.strips import Strips
from saejax.page.tables import Table, escape_markdown


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; ``strong`` sets it off as what a reader should not miss, ``alarm`` in red as what is wrong."""

    text: str
    strong: bool = False
    alarm: bool = False
    kind = "text"

    def markdown(self) -> str:
        """Return the block in Markdown."""
        text = escape_markdown(self.text)
        return f"> **{text}**" if self.alarm else f"> {text}" if self.strong else text


@dataclasses.dataclass(frozen=True)
class Terms:
    """A list of (term, what it means or what there is to say about it)."""

    items: tuple[tuple[str, str], ...]
    kind = "terms"

    def markdown(self) -> str:
        """Return the block in Markdown."""
        return "\n".join(f"- **{escape_markdown(term)}**: {escape_markdown(text)}" for term, text in self.items)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A saved figure."""

    name: str  #: ``figures/<name>.<ending>``
    svg: Markup  #: for use inside the page
    caption: str  #: what is to be seen, and how to read it
    alt: str  #: the same for someone who cannot see it, with the figures that matter
    ending: str = "png"  #: of the file that Markdown shows
    width: str = ""  #: CSS length of a figure that keeps its own size, however wide; "": the width of report figures
    kind = "picture"

    def markdown(self) -> str:
        """Return the block in Markdown."""
        alt = escape_markdown(self.alt)
        return f"![{alt}](figures/{self.name}.{self.ending})\n\n*{escape_markdown(self.caption)}*"


@dataclasses.dataclass(frozen=True)
class Code:
    """Text to copy; on the page, folded away unless ``folded`` is False."""

    title: str
    text: str
    folded: bool = True
    kind = "code"

    def markdown(self) -> str:
        """Return the block in Markdown."""
        fence = "```"
        while fence in self.text:
            fence += "`"
        return f"{escape_markdown(self.title)}:\n\n{fence}\n{self.text}\n{fence}"


@dataclasses.dataclass(frozen=True)
class Links:
    """Other files of the workdir."""

    title: str  #: what they are; "": nothing to be said
    items: tuple[tuple[str, str], ...]  #: (text, address relative to the report's folder, percent-encoded)
    kind = "links"

    def markdown(self) -> str:
        """Return the block in Markdown."""
        links = [f"- [{escape_markdown(text)}]({address})" for text, address in self.items]
        return "\n".join(([f"{escape_markdown(self.title)}:", ""] if self.title else []) + links)


Block = Text | Terms | Picture | Strips | Code | Table | Links
