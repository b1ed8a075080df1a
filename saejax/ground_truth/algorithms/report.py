"""The report's section on transformers that were trained on algorithms."""

from saejax.ground_truth.algorithms.results import AlgorithmResults
from saejax.page.blocks import Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, interval, number, percent


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on the accuracy of the trained transformers; none if none was trained."""
    units = findings.each(AlgorithmResults)
    if not units:
        return []
    rows = [(results, kind, share) for results in units.values() for kind, share in results.accuracy.items()]
    short = [kind for results, kind, share in rows if share.mean < results.required[kind]]
    verdict = (
        f"Not learned to the required accuracy: {', '.join(short)}."
        if short
        else "Every algorithm was learned to the required accuracy, on questions kept from training."
    )
    columns = {
        "Questions": lambda results, kind, share: kind,
        "Correct, %": lambda results, kind, share: interval(share, 2, 100),
        "Required": lambda results, kind, share: percent(results.required[kind]),
        "Kept from training": lambda results, kind, share: f"{results.fresh:,}",
        "Steps": lambda results, kind, share: f"{results.steps:,}",
        "Seconds": lambda results, kind, share: number(results.seconds, 0),
    }
    table = Table.of("Transformers trained on algorithms, with 95 % Wilson intervals", rows, columns)
    return [Section("Trained algorithms", (Text(verdict, strong=True), table), lead=verdict)]
