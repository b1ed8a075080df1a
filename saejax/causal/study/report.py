"""The report on benchmarks without a dictionary's top features."""

from collections.abc import Iterator, Mapping

from saejax.causal.claims import Rule
from saejax.causal.study.results import SingleEffects, StudyResults
from saejax.causal.study.scores import settled
from saejax.causal.study.single import line
from saejax.page.blocks import Block, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.page.words import place, sentence, spread
from saejax.runner.preregistration import describe_rule

_SCORES = {"generate": "exact match, %", "choice": "multiple choice, %"}
_REPLACEMENTS = {"zero": "set to zero", "random": "at random"}
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
    rule = f"{describe_rule(found.report.parent, 'study', one.rule)}: {sentence(one.rule)}"
    reasons = tuple((name, sentence(results.reason)) for name, results in studies.items())
    few = _too_few(len(studies), settings["study"]["draws"])
    single = tuple(_single(name, results.single) for name, results in studies.items() if results.single)
    blocks: tuple[Block, ...] = (Text(intro), Text(rule), *few, Terms(reasons), _table(found), *single)
    return [Section("Benchmarks without features", blocks)]


def _too_few(benchmarks: int, draws: int) -> tuple[Text, ...]:
    """That so few draws allow no yes, if they do not."""
    least = Rule().least_draws(benchmarks)
    if draws >= least:
        return ()
    said = f"No yes is possible: {draws} draws were made, and the rule takes {least} for the benchmarks of this run."
    return (Text(said, strong=True),)


def _table(found: Findings) -> Table:
    studies = found.each(StudyResults)
    verdicts = settled({name: results.claims for name, results in studies.items()})
    rows = tuple(row for name, results in studies.items() for row in _rows(name, results, verdicts[name]))
    columns = (
        "Benchmark",
        "Measure",
        "Before",
        "Replaced",
        "After",
        "Drop",
        "Drop, random features",
        "p",
        "Drop beyond them",
        "Yes or no",
    )
    note = (
        "Drops of accuracy are in percentage points. Square brackets: 95 % intervals over items, Wilson's of accuracy, "
        "bootstrap of all else; for random features the range of the middle 95 % of the draws. p: the share of the "
        "draws and the top features that cost at least as much. Yes or no: by the rule, with p after Holm's correction "
        "over the benchmarks."
    )
    model = found.settings()["model"]["path"]
    return Table(f"{model} on benchmarks without features", columns, rows, frozenset({1, 3, 9}), stack=False, note=note)


def _single(name: str, single: SingleEffects) -> Table:
    """The top features one by one."""
    columns = {
        "Feature": lambda one: str(one.feature),
        "Drop, nats": lambda one: interval(one.drop, 3),
        "q": lambda one: number(one.q_value, 3),
        "Random": lambda one: number(one.control_drop, 3),
        "Above random": lambda one: percent(one.control_percentile),
        "Accuracy drop": lambda one: interval(one.accuracy_drop, 1, 100),
        "Random, accuracy": lambda one: number(one.control_accuracy_drop, 1, 100),
    }
    rows = [(one,) for one in single.features]
    note = (
        f"{sentence(line(single))} Each feature is set to zero by itself on the test items; drops of the reference's "
        "log-likelihood are per token, with 95 % bootstrap intervals over items, those of accuracy in percentage "
        "points. q: over these features, of sign flips over items, which cannot give p below "
        f"{single.least_p:.1g}. Random: mean over the features that draws put in its place; above random: share of "
        "these that cost less."
    )
    return Table.of(f"{name} without single features", rows, columns, stack=False, note=note)


def _rows(name: str, results: StudyResults, verdicts: Mapping[str, tuple[bool, float]]) -> Iterator[tuple[str, ...]]:
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
                shown[2:2] = [spread(one.controls, digits, scale), number(one.p_value, 3)]
            verdict = MISSING
            if judged and replacement in verdicts:
                yes, p = verdicts[replacement]
                verdict = f"{'yes' if yes else 'no'} (p = {number(p, 3)})"
            yield (f"{name} ({results.items.test} items)", measure, before, words, *shown, verdict)
