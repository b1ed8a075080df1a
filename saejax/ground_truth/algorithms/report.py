"""The report on transformers that were trained on algorithms."""

from saejax.ground_truth.algorithms.results import AlgorithmResults
from saejax.page.document import Section, Text
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, interval, number, percent


def sections(found: Findings, draw: Draw) -> list[Section]:
    """What the transformers can do; no section if none was trained."""
    units = found.each(AlgorithmResults)
    if not units:
        return []
    short = [sort for one in units.values() for sort, share in one.accuracy.items() if share.mean < one.wanted[sort]]
    verdict = (
        f"Of the algorithms {', '.join(short)} was not learned as well as asked for."
        if short
        else "Every algorithm was learned as well as asked for, on questions that training never had."
    )
    rows = tuple(
        (
            sort,
            interval(share, 2, 100),
            percent(one.wanted[sort]),
            f"{one.fresh:,}",
            f"{one.steps:,}",
            number(one.seconds, 0),
        )
        for one in units.values()
        for sort, share in one.accuracy.items()
    )
    columns = ("Questions", "Right, %", "Asked for", "Fresh", "Steps", "Seconds")
    table = Table("Transformers trained on algorithms, with 95 % Wilson intervals", columns, rows)
    return [Section("Algorithms that were trained", (Text(verdict, strong=True), table), lead=verdict)]
