"""The report on benchmarks without a dictionary's top features."""

from collections.abc import Iterator

from saejax.causal.study.results import StudyResults
from saejax.page.document import Section, Terms, Text
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, percent
from saejax.page.words import place, sentence, spread

_SCORES = {"generate": "exact match, %", "choice": "multiple choice, %"}
_REPLACEMENTS = {"zero": "set to zero", "random": "at random"}
_VERDICTS = {True: "yes", False: "no", None: MISSING}
_NATS = "nats per token"


def sections(found: Findings, draw: Draw) -> list[Section]:
    """What removing features does to scores on benchmarks; no section if it was not asked for."""
    studies = found.each(StudyResults)
    if not studies:
        return []
    settings, one = found.settings(), next(iter(studies.values()))
    intro = (
        f"The {settings['study']['top']} features of {one.dictionary} (in {place(one.site)}) with the largest "
        f"estimated effect on the reference answer were chosen on one half of a benchmark's items. On the other half "
        f"{settings['model']['path']} was scored with their activations set to zero, and with each replaced, where it "
        f"fires, by its activation somewhere else; and the same with {settings['study']['draws']} sets of as many "
        "random features that fire as often and as strongly on those items."
    )
    rule = f"The rule, written before any data were seen: {sentence(one.rule)}"
    reasons = tuple((name, sentence(results.reason)) for name, results in found.each(StudyResults).items())
    return [Section("Benchmarks without features", (Text(intro), Text(rule), Terms(reasons), _table(found)))]


def _table(found: Findings) -> Table:
    rows = tuple(row for name, results in found.each(StudyResults).items() for row in _rows(name, results))
    columns = (
        "Benchmark",
        "Measure",
        "Before",
        "Replaced",
        "After",
        "Drop",
        "Drop, random features",
        "Draws with less",
        "Drop beyond them",
        "Yes or no",
    )
    note = (
        "Drops of accuracy are in percentage points. Square brackets: 95 % bootstrap intervals over items; for random "
        "features the range of the middle 95 % of the draws. Draws with less: share of the draws that cost less than "
        "the top features."
    )
    model = found.settings()["model"]["path"]
    return Table(f"{model} on benchmarks without features", columns, rows, frozenset({1, 3, 9}), stack=False, note=note)


def _rows(name: str, results: StudyResults) -> Iterator[tuple[str, ...]]:
    measures = [(results.log_likelihood_per_token, _NATS, 3, 1)]
    if results.accuracy:
        chance = f" (chance {percent(results.chance)})" if results.chance else ""
        measures.insert(0, (results.accuracy, _SCORES[results.score] + chance, 1, 100))
    for effects, measure, digits, scale in measures:
        before = interval(effects.before, digits, scale)
        for replacement, one in effects.replaced.items():
            words, judged = _REPLACEMENTS[replacement], scale == 100
            shown = [MISSING] * 5
            if one:
                shown = [interval(value, digits, scale) for value in (one.after, one.drop, one.difference)]
                shown[2:2] = [spread(one.controls, digits, scale), percent(one.percentile)]
            verdict = _VERDICTS[results.verdicts[replacement]] if judged else MISSING
            yield (f"{name} ({results.items.test} items)", measure, before, words, *shown, verdict)
