"""The report on circuits: a table, the pages, and published claims beside what was measured."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saejax.circuits.claims import CONFIRMED, compare_claims
from saejax.circuits.results import CircuitsResults
from saejax.files import write_text
from saejax.page.blocks import Block, Links, Text
from saejax.page.document import Section, to_html
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number
from saejax.page.words import behaviour as title


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return what was found in each behaviour, and a row for each published claim; nothing without circuits."""
    units = findings.each(CircuitsResults)
    parts = []
    for unit, results in units.items():
        folder = findings.folders["/".join(filter(None, ("circuits", unit)))]
        parts += circuit_sections(results, folder, findings.report)
    return parts


def write_index(folder: Path, results: CircuitsResults) -> None:
    """Write ``index.html`` in a unit's folder: the same sections, where there is no report."""
    parts = circuit_sections(results, folder, folder)
    lead = [part.lead for part in parts if part.lead]
    write_text(folder / "index.html", to_html("Circuits of behaviours", lead, parts, "Made by saejax."))


def circuit_sections(results: CircuitsResults, folder: Path, report: Path) -> list[Section]:
    """Return the sections on a unit's circuits.

    Args:
      results: of the unit.
      folder: its folder.
      report: folder of the page that shows them.
    """
    columns: Any = ("Behaviour", "Logit difference", "Features that return", "Groups", "Edges drawn", "Needed", "Carry")
    rows = []
    for name, circuit in results.behaviours.items():
        drawn = [edge.edit for edge in circuit.edges if edge.drawn]
        counts = (len(circuit.returning), len(circuit.groups), *(drawn.count(edit) for edit in ("direct", "total")))
        rows.append((title(name), number(circuit.logit_diff), *map(str, counts), str(drawn.count("swap"))))
    note = (
        "Needed: groups without which the logit difference falls more than without control sets of the same dose. "
        "Carry: groups that move the answer to the counterpart's when they take its activations."
    )
    pages = tuple(
        (title(name), quote(Path(os.path.relpath(folder / f"{name}.html", report)).as_posix()))
        for name in results.behaviours
    )
    left_out = "; ".join(f"{title(name)}: {why}" for name, why in results.left_out.items())
    blocks: list[Block] = [Table("Circuits", columns, tuple(rows), note=note), Links("Pages of the circuits", pages)]
    if left_out:
        blocks.append(Text(f"Left out: {left_out}."))
    comparisons = compare_claims(results)
    confirmed = sum(judged.outcome == CONFIRMED for judged in comparisons)
    claims = Table(
        "Published claims and what was measured here",
        ("Claim", "Published", "Here", "Evidence", "Source"),
        tuple((row.claim.id, row.claim.claim, row.outcome, row.evidence, row.claim.source) for row in comparisons),
        frozenset({1, 2, 3, 4}),
        note="Confirmed takes an edge that is drawn, so one that exceeds random and placebo features at equal dose. "
        "The published studies are of other, larger models.",
    )
    lead = (
        f"Features that return over prompts were grouped in {len(results.behaviours)} behaviours and each group's "
        f"effect was measured: {confirmed} of {len(comparisons)} published claims about such circuits are confirmed "
        "on this model."
    )
    return [
        Section("Circuits", tuple(blocks), lead=lead),
        Section("Circuits beside published ones", (claims,), level=3),
    ]
