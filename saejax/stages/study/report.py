"""The report on benchmarks: effects of ablating top features, pictures first."""

from saejax.interventions.answers import VerdictConfig
from saejax.interventions.falsify import Falsification, FalsifiedFeature
from saejax.interventions.table import TESTED, load_effects, merge_tables
from saejax.interventions.verdict import verdict
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.page.words import place
from saejax.stages.ablate.report import control_picture, headline, rule_in_full, seed_table, table_of_answers
from saejax.stages.study.results import AnswerScores, StudyResults
from saejax.wording import counted

_GROUPS = dict(
    clean="unedited model",
    top="top features set to zero",
    resample="top features resampled",
    random="random lists of the same dose",
    placebo="placebo sets of the same dose",
    untrained="lists of untrained dictionaries of the same dose",
)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Write what ablating features does to the answers to benchmarks; nothing if it was not asked for.

    Args:
      findings: what the report is written from.
      draw: draws a figure.
    """
    studies = findings.select(StudyResults)
    if not studies:
        return []
    settings = findings.settings()["study"]
    table = merge_tables([load_effects(findings.folders[f"study/{name}"]) for name in studies])
    config = VerdictConfig(
        min_accuracy_drop=settings["min_accuracy_drop"], resamples=settings["bootstrap"], seed=settings["seed"]
    )
    # Each unit has judged its benchmark alone; here p-values are corrected over all benchmarks of the run.
    judged = verdict(table, config).dictionaries
    first = next(iter(studies.values()))
    blocks: list[Block] = []
    for name, result in judged[TESTED].items():
        blocks.append(control_picture(f"ablation_benchmark_{name}", name, table, name, result, draw))
        blocks.append(Text(headline(name, result)))
    rows = judged[TESTED]
    note = (
        f"The {counted(first.k, 'feature')} of {first.dictionary} (in {place(first.site)}) with the largest "
        "attribution for the reference answers to one half of the items, ablated on the other half. Effect: lost "
        "log-likelihood of the reference answer, with its 95 % interval over items. Questions 2 and 4: median and "
        "95th percentile of the effects of controls of the same dose, how many times that the features cost (×), and "
        "the corrected p-value. Question 3: the same in nats of another quantity, the final answer's log-probability "
        "beyond a corrupted one's, under sets chosen for corrupted answers. Placebo sets that pass 2: those that cost "
        "more log-likelihood of the reference answer than nearly all random lists. Simpler bases: whether the features "
        "cost more than directions of these of the same dose."
    )
    blocks.append(table_of_answers("The questions, for benchmarks", "Benchmark", rows, note))
    blocks += seed_table("Benchmark", judged, first.dictionary)
    blocks += [_score_table(name, results) for name, results in studies.items() if results.scores]
    for name, results in studies.items():
        if results.falsification:
            blocks += falsification_tables(name, results.falsification)
    at_chance = [
        f"{name} ({counted(results.items.test, 'item')})" for name, results in studies.items() if results.at_chance
    ]
    if at_chance:
        chance = (
            f"The unedited model is not shown to be above chance on {', '.join(at_chance)}, so only log-likelihoods "
            "are compared there."
        )
        blocks.append(Text(chance, strong=True))
    blocks.append(rule_in_full(first.rule))
    return [Section("Benchmarks under ablation", tuple(blocks))]


def falsification_tables(benchmark: str, falsification: Falsification) -> list[Block]:
    """Return what drives the features of a benchmark: the shares of each group, and the tested features one by one."""
    shares = {
        "Features": lambda row: row.group,
        "Number": lambda row: str(row.features),
        "Driven by tokens, %": lambda row: interval(row.tokens, 0, 100),
        "By context, %": lambda row: interval(row.context, 0, 100),
        "Undecided, %": lambda row: interval(row.undecided, 0, 100),
    }
    columns = {
        "Feature": lambda row: str(row.feature),
        "Tokens": lambda row: ", ".join(f"\u201c{token}\u201d" for token in row.tokens) or MISSING,
        "Ordinary text": lambda row: number(row.ordinary.mean),
        "Random tokens": lambda row: number(row.random.mean),
        "Its tokens": lambda row: number(row.activation.mean),
        "Real text": lambda row: number(row.real.mean),
        "Reach": lambda row: interval(row.test.reach),
        "Driven by": lambda row: row.test.driver,
    }
    tested: list[tuple[FalsifiedFeature]] = [(row,) for row in falsification.features if row.group == "tested"]
    note = (
        f"{falsification.rule} Activations are means over texts of the largest one of each: {falsification.ordinary} "
        f"ordinary texts, without and with injected tokens, and {falsification.texts} texts of the benchmark."
    )
    caption = f"Do the top features of {benchmark} fire on words alone?"
    return [
        Table.of(
            caption,
            [(row,) for row in falsification.shares],
            shares,
            words={"Features"},
            note="Square brackets: 95 % intervals over features.",
        ),
        Table.of(
            f"The top features of {benchmark} under injected tokens",
            tested,
            columns,
            words={"Tokens", "Driven by"},
            note=note,
        ),
    ]


def _score_table(name: str, results: StudyResults) -> Table:
    """Return the table of scored answers."""
    columns = {
        "Condition": lambda row: _GROUPS[row.group],
        "Sets": lambda row: str(row.sets) if row.p_value is not None else MISSING,
        "Accuracy, %": lambda row: percent(row.accuracy, 1),
        "Drop, points": lambda row: number(100 * row.drop, 1) if row.group != "clean" else MISSING,
        "Largest drop": lambda row: number(100 * row.largest_drop, 1) if row.p_value is not None else MISSING,
        "p": lambda row: number(row.p_value, 3),
    }
    note = "p: share of the top features and the control sets that lose at least as much accuracy as the top features."
    if results.scores[0].strict is not None:
        columns |= {
            "Strict rule, %": lambda row: percent(row.strict, 1),
            "No answer by it, %": lambda row: percent(row.unformatted, 1),
            "Cut off, %": lambda row: percent(row.cut, 1),
        }
        note += " Accuracy is by the flexible rule, which takes the last number or formula of the text."
    rows: list[tuple[AnswerScores]] = [(row,) for row in results.scores]
    return Table.of(f"Answers to {name} ({counted(results.items.test, 'item')})", rows, columns, stack=False, note=note)
