"""The report on what was asked for beside the answer: other bases, other dictionaries, and sets of features."""

from collections.abc import Mapping

from saejax.causal.ablate import report_figures
from saejax.causal.ablate.report_figures import Effect
from saejax.causal.ablate.results import (
    AblateResults,
    BehaviourAblation,
    ComparedBasis,
    CumulativeCurve,
    DictionaryAgreement,
    GreedySet,
    UncomparedBasis,
)
from saejax.causal.circuits.results import CircuitResult, CircuitTest
from saejax.causal.stability import DRAWS, LEAST
from saejax.page.document import Block, Picture, Section, Text
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.page.words import behaviour

_BASES = dict(neurons="MLP neurons", components="principal components", random="untrained dictionary")
_TESTS = {  # of a claim that is shown, refuted, and neither
    "equivalence": dict(shown="equivalent", refuted="not equivalent", inconclusive="inconclusive"),
    "independence": dict(refuted="depends", inconclusive="not refuted"),
    "minimality": dict(shown="minimal", inconclusive="not shown"),
    "sufficiency": dict(shown="sufficient", inconclusive="not shown"),
    "necessity": dict(shown="necessary", inconclusive="not shown"),
}


def bases(found: Findings, draw: Draw) -> list[Section]:
    """A figure of all behaviours; no section if nothing was compared."""
    ablate = found.one(AblateResults)
    results = ablate.behaviours
    compared = {behaviour(name): rows_of(result) for name, result in results.items() if result.baselines}
    if not compared:
        return []
    caption = (
        f"The logit difference that is lost without the top {ablate.top} directions of each basis, chosen on "
        "train prompts, on the test prompts; and without as many random ones of the same basis, matched in firing "
        "rate, size and length (grey crosses: mean over draws). 95 % bootstrap intervals over prompts."
    )
    alt = "Logit difference lost. " + " ".join(
        f"{name}: " + ", ".join(f"{basis} {interval(row.drop)}" for basis, row in rows.items()) + "."
        for name, rows in compared.items()
    )
    picture: Picture = draw("bases", report_figures.bases(compared), caption, alt)
    missing = sorted(
        {
            f"{_BASES.get(name, name)}, {behaviour(of)}: {entry.reason}"
            for of, result in results.items()
            for name, entry in (result.baselines or {}).items()
            if isinstance(entry, UncomparedBasis)
        }
    )
    notes = [Text(f"Not compared: {'; '.join(missing)}.")] if missing else []
    return [Section("Beside other bases", (picture, *notes))]


def rows_of(result: BehaviourAblation) -> dict[str, Effect]:
    """Of one behaviour, basis -> what its top directions cost, and what random ones do."""
    rows = {"features": Effect(result.joint.logit_diff_drop, result.controls.logit_diff_drop)}
    for name, entry in (result.baselines or {}).items():
        if isinstance(entry, ComparedBasis):
            words = _BASES.get(name, name.rstrip("/").rpartition("/")[2])
            rows[words] = Effect(entry.joint.logit_diff_drop, (entry.control_drop,))
    return rows


def agreement(found: Findings) -> list[Section]:
    """A table of all pairs; no section if none was compared."""
    rows = tuple(
        _agreement_row(name, entry)
        for name, result in found.one(AblateResults).behaviours.items()
        for entry in (result.importance and result.importance.agreement) or ()
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


def _agreement_row(name: str, entry: DictionaryAgreement) -> tuple[str, ...]:
    shares = ", ".join(percent(share) for share in entry.shares)
    correlations = (entry.rank_correlation, entry.shuffled, entry.alike)
    return (
        behaviour(name),
        f"{entry.first}, {entry.second}",
        entry.by,
        f"{entry.matched:,} ({shares})",
        number(entry.similarity),
        *(interval(value) if value else MISSING for value in correlations),
    )


def feature_sets(found: Findings, draw: Draw) -> list[Section]:
    """The cumulative curves, greedy sets and tests of circuits; no section if nothing of it was measured."""
    results = {behaviour(name): result for name, result in found.one(AblateResults).behaviours.items()}
    curves = {name: result.curve for name, result in results.items() if result.curve}
    grown = {name: result.greedy for name, result in results.items() if result.greedy}
    tested = {name: result.circuit for name, result in results.items() if result.circuit}
    blocks: list[Block] = []
    if curves:
        blocks.append(_curves(curves, draw))
    if grown:
        blocks.append(_greedy_table(grown))
    if tested:
        blocks.append(_circuit_table(tested))
    return [Section("Sets of features", tuple(blocks))] if blocks else []


def _curves(curves: Mapping[str, CumulativeCurve], draw: Draw) -> Picture:
    caption = (
        "The logit difference that is left when the first 1, 2, 3, ... top features are removed together, and when as "
        "many random features are, matched to them one by one. Bands: 95 % bootstrap intervals over prompts."
    )
    alt = "Logit difference left. " + " ".join(
        f"{name}: without {curve.top.sizes[-1]} top features {interval(curve.top.logit_diff[-1])}, "
        f"without as many random ones {interval(curve.controls.logit_diff[-1])}."
        for name, curve in curves.items()
    )
    return draw("cumulative", report_figures.cumulative(curves), caption, alt)


def _greedy_table(grown: Mapping[str, GreedySet]) -> Table:
    rows = tuple(
        (
            name,
            str(len(set_.features)),
            *(interval(values[-1]) for values in (set_.greedy_drop, set_.top_drop, set_.difference)),
        )
        if set_.features
        else (name, "0", MISSING, MISSING, MISSING)
        for name, set_ in grown.items()
    )
    note = (
        "A set grown step by step on train prompts, each time by the feature whose removal with the set costs most, "
        "beside as many top features by attribution. Logit difference lost on the test prompts, with 95 % intervals; "
        "the difference is paired by prompt."
    )
    columns = ("Behaviour", "Features", "Greedy set", "Top features", "Difference")
    return Table("Sets grown on train prompts", columns, rows, note=note)


def _circuit_table(tested: Mapping[str, CircuitResult]) -> Table:
    rows = tuple(
        (
            name,
            *(_cell(kind, circuit.tests[kind]) for kind in _TESTS),
            " / ".join(map(number, (circuit.clean, circuit.kept, circuit.removed))),
        )
        for name, circuit in tested.items()
    )
    note = (
        "Claims about the top features as a circuit, tested (after Shi et al., 2024). Alone: all other features that "
        "fire are removed. Equivalent: alone the set does better than the model as often as worse, within 10 points "
        "(share of prompts on which it does better; two one-sided tests, so that too few prompts are inconclusive and "
        "no yes). Independent: what is left without the set does not depend on the model's score, which can be "
        "refuted but not shown. Minimal: every feature matters more than features matched to it (share of those that "
        "do). Sufficient, necessary: the set beats matched random sets, kept or removed (share of those beaten). In "
        "brackets p-values: of claims after Holm's correction for four; of what speaks against the set (not "
        "equivalent, depends) without, as that would help the set. Last column: mean logit difference of the model, "
        "of the set alone, without the set."
    )
    columns = ("Behaviour", "Equivalent", "Independent", "Minimal", "Sufficient", "Necessary", "Clean / kept / removed")
    return Table("The top features as a circuit", columns, rows, frozenset(range(1, 6)), stack=True, note=note)


def _cell(kind: str, outcome: CircuitTest) -> str:
    if outcome.answer is None:
        return MISSING
    share = "" if kind == "independence" else f"{percent(outcome.statistic)}, "
    against = outcome.answer == "refuted" or outcome.p_holm is None
    value = outcome.p_against if against else outcome.p_holm
    p = f"= {number(value, 3)}" if value is None or value >= 0.001 else "< 0.001"
    return f"{_TESTS[kind][outcome.answer]} ({share}p {p})"
