"""The report on texts that were followed: what became of their steps, and where their page is."""

from collections.abc import Sequence

from saejax.matching.track.results import StepTest, TrackResults
from saejax.page.blocks import Links, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number, percent, significant


def sections(found: Findings, draw: Draw) -> list[Section]:
    """Return a table of the texts, and links to their pages; no section if there are none."""
    units = found.each(TrackResults)
    if not units:
        return []
    intro = (
        "Prompts and worked solutions were followed through the layers that have dictionaries. Links by attribution "
        "are edges of the attribution graph; links by geometry join features of consecutive dictionaries at one "
        "position whose directions are closer than random ones are, and miss what a layer computes. A step is hurt by "
        "its features if removing those that belong to it costs its tokens more than removing matched ones, by the "
        "rule of the ablation, with Holm's correction over the steps of a text."
    )
    columns = {
        "Text": lambda slug, text, tests: slug,
        "Tokens": lambda slug, text, tests: str(text.tokens),
        "Layers": lambda slug, text, tests: str(len(text.sites)),
        "Links": lambda slug, text, tests: f"{text.links:,} ({text.link_kind})",
        "Answer": lambda slug, text, tests: f"{text.answer.strip()} {number(text.lenses['logit'].answer[-1])}",
        "Steps tested": lambda slug, text, tests: str(len(tests)),
        "Hurt": lambda slug, text, tests: significant(sum(test.claim.yes for test in tests), 2),
        "Matched sets that pass": lambda slug, text, tests: percent(_placebo(tests), 1),
    }
    rows = [
        (slug, text, [test for step in text.steps for test in step.tests.values()])
        for results in units.values()
        for slug, text in results.texts.items()
    ]
    pages = []
    for unit, results in units.items():
        page = found.folders[f"track/{unit}"] / "index.html"
        address = found.address(page)
        pages.append((f"{', '.join(results.texts)}: layers by positions", address))
    note = "Answer: the probability of its first token."
    table = Table.of("Texts", rows, columns, note=note)
    return [Section("Through the layers", (Text(intro), table, Links("Pages", tuple(pages))))]


def _placebo(tests: Sequence[StepTest]) -> float | None:
    return sum(test.claim.placebo_rate for test in tests) / len(tests) if tests else None
