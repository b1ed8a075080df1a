"""A report as blocks under headings, written once as an HTML page and once as Markdown."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from saejax.page.blocks import Block
from saejax.page.tables import escape_markdown
from saejax.unicode import visible


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, of level 2 or 3, and what stands under it; perhaps a paragraph for the beginning of the report."""

    title: str
    blocks: tuple[Block, ...]
    level: int = 2
    lead: str = ""

    @property
    def anchor(self) -> str:
        """Its address on the page: lower case letters, digits and hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


def to_html(title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Return the page, complete in itself.

    It has no script and no outside resource; ``Links`` lead to other files of the workdir.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saejax.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_bind,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(runs=_runs, visible=visible)
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, lead=lead, sections=sections, footer=footer)


def _bind(value: Any) -> Any:
    """Keep a percent sign on the line of its number, in plain text."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", value) if type(value) is str else value


def _runs(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Return runs of neighbouring blocks of the same kind, each with its kind."""
    return [(kind, list(run)) for kind, run in itertools.groupby(blocks, key=lambda block: block.kind)]


def to_markdown(title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Return the same content in Markdown; figures are links into ``figures/``."""
    parts = [f"# {escape_markdown(title)}", *map(escape_markdown, lead)]
    for section in sections:
        parts.append(f"{'#' * section.level} {escape_markdown(section.title)}")
        parts += [block.markdown() for block in section.blocks]
    return "\n\n".join([*parts, "---", escape_markdown(footer)]) + "\n"
