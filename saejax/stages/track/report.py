"""The report on texts that were followed: what became of their steps, and where their page is."""

from collections.abc import Sequence

from saejax.matching.track.measured import CONTROLS
from saejax.matching.track.results import StepTest, TrackedText, TrackResults
from saejax.page.blocks import Block, Links, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, answer, number
from saejax.page.words import place

_UNTESTED = "not testable"


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a table of the texts, and links to their pages; no section if there are none."""
    units = findings.select(TrackResults)
    if not units:
        return []
    intro = (
        "Prompts and worked solutions were followed through the layers that have dictionaries. Links join features of "
        "consecutive dictionaries at one position whose directions are closer than random ones are, and miss what a "
        "layer computes. A step is hurt by "
        "its features if ablating those that belong to it lowers its tokens' log-likelihood more than random lists "
        "of the same dose, with Holm's correction over the steps of a text."
    )
    columns = {
        "Text": lambda slug, text, tests: slug,
        "Tokens": lambda slug, text, tests: str(text.tokens),
        "Layers": lambda slug, text, tests: str(len(text.sites)),
        "Links": lambda slug, text, tests: f"{text.links:,}",
        "Answer": lambda slug, text, tests: f"{text.answer.strip()} {number(text.lens.answer[-1])}",
        "Output": lambda slug, text, tests: f"\u201c{text.output}\u201d" if text.output else MISSING,
        "Steps tested": lambda slug, text, tests: str(sum(test.hurt != _UNTESTED for test in tests)),
        "Hurt": lambda slug, text, tests: str(sum(test.hurt == "yes" for test in tests)),
        "Not testable": lambda slug, text, tests: str(sum(test.hurt == _UNTESTED for test in tests)),
    }
    rows = [
        (slug, text, [step.test for step in text.steps if step.test])
        for results in units.values()
        for slug, text in results.texts.items()
    ]
    pages = tuple(
        (
            f"{', '.join(results.texts)}: layers by positions",
            findings.address(findings.folders[f"track/{unit}"] / "index.html"),
        )
        for unit, results in units.items()
    )
    note = (
        "Answer: the probability of its first token. Output: what the model writes after the prompt, if it was asked."
    )
    table = Table.of("Texts", rows, columns, words={"Text", "Output"}, note=note)
    blocks = [Text(intro), table, *_measured(rows), Links("Pages", pages)]
    return [Section("Through the layers", tuple(blocks))]


def _measured(rows: Sequence[tuple[str, TrackedText, Sequence[StepTest]]]) -> list[Block]:
    """Return a table of the measured chains of all texts, link by link, and how many had no controls, if any."""
    links = [
        (f"{slug}, {count}", link, chain)
        for slug, text, _ in rows
        for count, chain in enumerate(text.chains, 1)
        for link in chain.links
    ]
    columns = {
        "Chain; holds": lambda name, link, chain: f"{name}; {answer(chain.holds, _UNTESTED)}",
        "Link": lambda name, link, chain: (
            f"{link.source} in {place(link.lower)} to {link.target} in {place(link.upper)}"
        ),
        "At": lambda name, link, chain: f"\u201c{link.token}\u201d",
        "Lost, %": lambda name, link, chain: f"{number(100 * link.lost, 0)}; {number(100 * link.random_lost, 0)}",
        "Holds": lambda name, link, chain: answer(link.holds, _UNTESTED),
        "Answer, nats": lambda name, link, chain: f"{number(link.answer_drop)}; {number(link.random_drop)}",
        "From the lowest": lambda name, link, chain: f"{number(chain.answer_drop)}; {number(chain.random_drop)}",
    }
    note = (
        "A chain goes from a feature to one of the next dictionary, and so on, to the answer. Lost: share of the upper "
        "feature's activation that is lost when the lower one is set to zero there; after the semicolon, the mean of "
        f"{CONTROLS} random features that are active there, at equal dose. A link holds if more is lost than with each "
        "of these. Answer: the log-probability of the answer that is lost when the upper feature is set to zero, and "
        f"with {CONTROLS} random ones of its layer; from the lowest: when the lowest feature of the chain is. A chain "
        f"holds if all of its links do, and its ends lower the answer's log-probability more than each of {CONTROLS} "
        "random ones: with fewer active features neither can be tested."
    )
    words = {"Link", "At", "Holds"}
    table = Table.of("The strongest chains, measured", links, columns, words=words, note=note)
    blocks: list[Block] = [table] if links else []
    if left_out := [f"{slug} ({text.chains_left_out})" for slug, text, _ in rows if text.chains_left_out]:
        blocks.append(
            Text(
                "Strongest chains left out of the table, where at their position a dictionary has no other active "
                f"feature to compare with: {', '.join(left_out)}."
            )
        )
    return blocks
