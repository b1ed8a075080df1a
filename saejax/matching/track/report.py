"""The report on texts that were followed: what became of their steps, and where their page is."""

from saejax.matching.track.results import TrackResults
from saejax.page.blocks import Links, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a table of the texts, and links to their pages; no section if there are none."""
    units = findings.each(TrackResults)
    if not units:
        return []
    intro = (
        "Prompts and worked solutions were followed through the layers that have dictionaries. Links by attribution "
        "are edges of the attribution graph; links by geometry join features of consecutive dictionaries at one "
        "position whose directions are closer than random ones are, and miss what a layer computes. A step is hurt by "
        "its features if ablating those that belong to it lowers its tokens' log-likelihood more than random sets at "
        "equal dose, with Holm's correction over the steps of a text."
    )
    columns = {
        "Text": lambda slug, text, tests: slug,
        "Tokens": lambda slug, text, tests: str(text.tokens),
        "Layers": lambda slug, text, tests: str(len(text.sites)),
        "Links": lambda slug, text, tests: f"{text.links:,} ({text.link_kind})",
        "Answer": lambda slug, text, tests: f"{text.answer.strip()} {number(text.lenses['logit'].answer[-1])}",
        "Steps tested": lambda slug, text, tests: str(len(tests)),
        "Hurt": lambda slug, text, tests: str(sum(test.hurt == "yes" for test in tests)),
        "Not testable": lambda slug, text, tests: str(sum(test.hurt == "not testable" for test in tests)),
    }
    rows = [
        (slug, text, [test for step in text.steps for test in step.tests.values()])
        for results in units.values()
        for slug, text in results.texts.items()
    ]
    pages = []
    for unit, results in units.items():
        page = findings.folders[f"track/{unit}"] / "index.html"
        address = findings.address(page)
        pages.append((f"{', '.join(results.texts)}: layers by positions", address))
    note = "Answer: the probability of its first token."
    table = Table.of("Texts", rows, columns, note=note)
    return [Section("Through the layers", (Text(intro), table, Links("Pages", tuple(pages))))]
