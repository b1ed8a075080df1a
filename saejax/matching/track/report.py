"""The report on texts that were followed: what became of their steps, and where their page is."""

from collections.abc import Sequence

from saejax.matching.track.results import StepTest, TrackedText, TrackResults
from saejax.page.blocks import Block, Links, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, answer, number
from saejax.page.words import place


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a table of the texts, and links to their pages; no section if there are none."""
    units = findings.each(TrackResults)
    if not units:
        return []
    intro = (
        "Prompts and worked solutions were followed through the layers that have dictionaries. Links join features of "
        "consecutive dictionaries at one position whose directions are closer than random ones are, and miss what a "
        "layer computes. A step is hurt by "
        "its features if ablating those that belong to it lowers its tokens' log-likelihood more than random sets at "
        "equal dose, with Holm's correction over the steps of a text."
    )
    columns = {
        "Text": lambda slug, text, tests: slug,
        "Tokens": lambda slug, text, tests: str(text.tokens),
        "Layers": lambda slug, text, tests: str(len(text.sites)),
        "Links": lambda slug, text, tests: f"{text.links:,}",
        "Answer": lambda slug, text, tests: f"{text.answer.strip()} {number(text.lens.answer[-1])}",
        "Output": lambda slug, text, tests: f"\u201c{text.output}\u201d" if text.output else MISSING,
        "Steps tested": lambda slug, text, tests: str(len(tests)),
        "Hurt": lambda slug, text, tests: str(sum(test.hurt == "yes" for test in tests)),
        "Not testable": lambda slug, text, tests: str(sum(test.hurt == "not testable" for test in tests)),
    }
    rows = [
        (slug, text, [step.test for step in text.steps if step.test])
        for results in units.values()
        for slug, text in results.texts.items()
    ]
    pages = []
    for unit, results in units.items():
        page = findings.folders[f"track/{unit}"] / "index.html"
        address = findings.address(page)
        pages.append((f"{', '.join(results.texts)}: layers by positions", address))
    note = (
        "Answer: the probability of its first token. Output: what the model writes after the prompt, if it was asked."
    )
    table = Table.of("Texts", rows, columns, words={"Text", "Output"}, note=note)
    blocks = [Text(intro), table, *_measured(rows), Links("Pages", tuple(pages))]
    return [Section("Through the layers", tuple(blocks))]


def _measured(rows: Sequence[tuple[str, TrackedText, Sequence[StepTest]]]) -> list[Block]:
    """Return a table of the measured chains of all texts, link by link; nothing if there are none."""
    rows_of_links = [
        (f"{slug}, {count}", link, chain if link is chain.links[-1] else None)
        for slug, text, _ in rows
        for count, chain in enumerate(text.chains, 1)
        for link in chain.links
    ]
    columns = {
        "Chain": lambda name, link, ended: name,
        "Link": lambda name, link, ended: (
            f"{link.source} in {place(link.lower)} to {link.target} in {place(link.upper)}"
        ),
        "At": lambda name, link, ended: f"\u201c{link.token}\u201d",
        "Lost, %": lambda name, link, ended: f"{number(100 * link.lost, 0)}; {number(100 * link.random_lost, 0)}",
        "Holds": lambda name, link, ended: answer(link.holds),
        "Answer, nats": lambda name, link, ended: f"{number(link.answer_drop)}; {number(link.random_drop)}",
        "Reaches it": lambda name, link, ended: answer(link.reaches_answer),
        "From the lowest": lambda name, link, ended: (
            f"{number(ended.answer_drop)}; {number(ended.random_drop)}" if ended else ""
        ),
        "Chain holds": lambda name, link, ended: answer(ended.holds) if ended else "",
    }
    note = (
        "A chain goes from a feature to one of the next dictionary, and so on, to the answer. Lost: share of the upper "
        "feature's activation that is lost when the lower one is set to zero there; after the semicolon, the mean of "
        "five random features that are active there, at equal dose. Holds: more than each of the five. Answer: the "
        "log-probability of the answer that is lost when the upper feature is set to zero, and with five random ones "
        "of its layer; from the lowest: when the lowest feature of the chain is. A chain holds if all of its links do "
        "and both its ends reach the answer."
    )
    words = {"Chain", "Link", "At", "Holds", "Reaches it", "Chain holds"}
    table = Table.of("The strongest chains, measured", rows_of_links, columns, words=words, note=note)
    return [table] if rows_of_links else []
