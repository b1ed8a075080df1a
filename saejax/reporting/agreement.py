"""The report's section on other dictionaries: whether their features matter as those of the tested one do."""

from collections.abc import Mapping
from typing import Any

from saejax.causal.stability import DRAWS, LEAST
from saejax.reporting.document import Section
from saejax.reporting.findings import Findings
from saejax.reporting.sections import behaviour
from saejax.reporting.tables import MISSING, Table, interval, number, percent


def sections(found: Findings) -> list[Section]:
    """A table of all pairs; no section if none was compared."""
    rows = tuple(
        _row(name, entry)
        for name, result in found.ablate["behaviours"].items()
        for entry in result.get("importance", {}).get("agreement", ())
    )
    if not rows:
        return []
    columns = (
        "Behaviour",
        "Dictionaries",
        "Matched by",
        "Features matched",
        "Similarity",
        "Rank correlation of effects",
        "Pairs shuffled",
        "Partners that fire alike",
    )
    note = (
        "Two features match if each is the other's nearest, by the cosine of their decoder rows (direction) or, of "
        "dictionaries of different sites, by the correlation of their largest activations over the test prompts "
        f"(activity), of at least {LEAST:g}. In brackets the share of each dictionary's features that fire. Rank "
        "correlation (Spearman) of the logit difference lost without each, with its 95 % bootstrap interval over "
        f"pairs. Controls, mean and middle 95 % of {DRAWS} draws: the same where pairs are shuffled, and where each "
        "partner is replaced by one of the ten features nearest to it in firing rate and activation."
    )
    return [Section("Beside other dictionaries", (Table("Agreement of effects", columns, rows, note=note),))]


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    shares = ", ".join(percent(share) for share in entry["shares"])
    correlations = [entry[key] for key in ("rank_correlation", "shuffled", "alike")]
    return (
        behaviour(name),
        f"{entry['first']}, {entry['second']}",
        entry["by"],
        f"{entry['matched']:,} ({shares})",
        number(entry["similarity"]),
        *(interval(value) if value else MISSING for value in correlations),
    )
