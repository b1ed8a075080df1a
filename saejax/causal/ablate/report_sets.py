"""The report on what was asked for beside the answer: other bases, other dictionaries, and sets of features."""

from collections.abc import Mapping

from saejax.causal.ablate import report_figures
from saejax.causal.ablate.results import AblateResults, CumulativeCurve, DoseCurve, GreedySet, UncomparedBasis
from saejax.causal.circuits.report import size_blocks
from saejax.causal.circuits.results import CircuitResult, CircuitTest
from saejax.causal.results import EqualDose
from saejax.causal.stability import DRAWS, LEAST
from saejax.page.blocks import Block, Picture, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.page.words import behaviour
from saejax.results import Interval

YES = {True: "yes", False: "no", None: "not known"}
BASES = dict(
    features="top features",
    neurons="MLP neurons",
    components="principal components",
    random="untrained dictionary",
    difference="difference of means",
)
_TESTS = {  # of a claim that is shown, refuted, and neither
    "equivalence": dict(shown="equivalent", refuted="not equivalent", inconclusive="inconclusive"),
    "independence": dict(refuted="depends", inconclusive="not refuted"),
    "minimality": dict(shown="minimal", inconclusive="not shown"),
    "sufficiency": dict(shown="sufficient", inconclusive="not shown"),
    "necessity": dict(shown="necessary", inconclusive="not shown"),
}


def bases(found: Findings, draw: Draw) -> list[Section]:
    """The curves of effect against dose and their areas; no section if nothing was compared."""
    results = {behaviour(name): result for name, result in found.one(AblateResults).behaviours.items()}
    curves = {
        name: {named(basis): curve for basis, curve in (result.doses or {}).items() if isinstance(curve, DoseCurve)}
        for name, result in results.items()
    }
    compared = {name: of_bases for name, of_bases in curves.items() if len(of_bases) > 1}
    missing = sorted(
        {
            f"{named(name)}, {of}: {entry.reason}"
            for of, result in results.items()
            for name, entry in (result.doses or {}).items()
            if isinstance(entry, UncomparedBasis)
        }
    )
    notes = [Text(f"Not compared: {'; '.join(missing)}.")] if missing else []
    if not compared:
        return [Section("Beside other bases at equal dose", tuple(notes))] if notes else []
    caption = (
        "The logit difference that is lost on the test prompts without growing sets of each basis's top directions, "
        "chosen on train prompts, against how much that changes the site. A curve above another: the same dose costs "
        "more."
    )
    alt = "Logit difference lost by the largest set of each basis. " + " ".join(
        f"{name}: " + ", ".join(f"{basis} {number(curve.logit_diff_drop[-1])}" for basis, curve in rows.items()) + "."
        for name, rows in compared.items()
    )
    picture: Picture = draw("doses", report_figures.doses(compared), caption, alt)
    return [Section("Beside other bases at equal dose", (picture, _areas(compared), *notes))]


def _areas(compared: Mapping[str, Mapping[str, DoseCurve]]) -> Table:
    rows = tuple(
        (
            name,
            f"{basis} ({curve.size:,})",
            *(text for at in (curve.by_norm, curve.by_kl) for text in _equal_dose(at)),
        )
        for name, curves in compared.items()
        for basis, curve in curves.items()
        if curve.by_norm or curve.by_kl
    )
    note = (
        "Mean logit difference lost over all doses that both reach (the area under the curve by its width): of the top "
        "features, of the other basis (in brackets how many directions it has), and the difference, paired by prompt, "
        "with a 95 % bootstrap interval over templates and prompts. Dose by norm: of the change at the site. Dose by "
        "divergence: of the predictions on held-out text from the clean ones. Bases: "
        "neurons of the layer's MLP; principal components of the site on the train prompts; a dictionary that was "
        "never trained, as sparse as the tested one; difference of means, the principal directions of the site's means "
        "by answer."
    )
    sides = "Features / basis, equal norm", "Difference", "Features / basis, equal divergence", "Difference"
    columns = "Behaviour", "Basis", *sides
    return Table("Effects at equal dose", columns, rows, stack=True, note=note)


def _equal_dose(at: EqualDose | None) -> tuple[str, str]:
    if at is None:
        return MISSING, MISSING
    return f"{number(at.features)} / {number(at.basis)}", interval(at.difference)


def named(basis: str) -> str:
    """What a basis is called."""
    return BASES.get(basis, basis.rstrip("/").rpartition("/")[2])


def agreement(found: Findings) -> list[Section]:
    """A table of all pairs; no section if none was compared."""
    rows = [
        (name, entry)
        for name, result in found.one(AblateResults).behaviours.items()
        for entry in (result.importance and result.importance.agreement) or ()
    ]
    if not rows:
        return []
    columns = {
        "Behaviour": lambda name, pair: behaviour(name),
        "Dictionaries": lambda name, pair: f"{pair.first}, {pair.second}",
        "Matched by": lambda name, pair: pair.by,
        "Features matched": lambda name, pair: f"{pair.matched:,} ({', '.join(map(percent, pair.shares))})",
        "Similarity": lambda name, pair: number(pair.similarity),
        "Rank correlation of effects": lambda name, pair: interval(pair.rank_correlation),
        "Pairs shuffled": lambda name, pair: interval(pair.shuffled),
        "Partners that fire alike": lambda name, pair: interval(pair.alike),
    }
    note = (
        "Two features match if each is the other's nearest, by the cosine of their decoder rows (direction) or, of "
        "dictionaries of different sites, by the correlation of their largest activations over the test prompts "
        f"(activity), of at least {LEAST:g}. In brackets the share of each dictionary's features that fire. Rank "
        "correlation (Spearman) of the logit difference lost without each, with its 95 % bootstrap interval over "
        f"pairs. Controls, mean and middle 95 % of {DRAWS} draws: the same where pairs are shuffled, and where each "
        "partner is replaced by one of the ten features nearest to it in firing rate and activation."
    )
    return [Section("Beside other dictionaries", (Table.of("Agreement of effects", rows, columns, note=note),))]


def repeats(found: Findings) -> list[Section]:
    """A table of the trainings that were tested in the same way; no section if there was one alone."""
    ablate = found.one(AblateResults)
    rows = tuple(
        (
            behaviour(name),
            training,
            interval(test.joint.accuracy_drop, 0, 100),
            interval(test.joint.logit_diff_drop),
            *(significant(p, 2) for p in (test.claim.p_logit_diff, test.claim.p_accuracy)),
            interval(Interval(test.claim.placebo_rate, test.claim.placebo_low, test.claim.placebo_high), 1, 100),
            YES[test.harms.holds],
            YES[test.beyond_matched.holds],
        )
        for name, result in ablate.behaviours.items()
        if result.repeats
        for training, test in zip([ablate.dictionary, *result.repeats], result.trainings, strict=True)
    )
    if not rows:
        return []
    columns = (
        *("Behaviour", "Training", "Accuracy lost, points", "Logit difference lost", "p, logit difference"),
        *("p, accuracy", "Placebo rate, %", "Harms", "Beyond matched"),
    )
    note = (
        "Each training has top features, controls and draws of its own. Square brackets: 95 % intervals. p-values are "
        "those before correction, placebo rates those of a behaviour alone."
    )
    return [Section("The same test of other trainings", (Table("Trainings", columns, rows, note=note),))]


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
        blocks += [_circuit_table(tested), *size_blocks(tested)]
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
