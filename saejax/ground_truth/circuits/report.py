"""The report on transformers that are set by hand: what of their circuits is found, and with which transcoders."""

from collections.abc import Iterator, Mapping

from saejax.ground_truth.circuits.dictionaries import EXACT, RANDOM, TRAINED, UNTRAINED, WRONG
from saejax.ground_truth.circuits.results import CausalScores, JudgedSet, KnownCircuitResults
from saejax.page.blocks import Block, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent, significant

_EDGE = 1e-5  # largest error of an edge
_ABOUT = {
    "chain": "Features are passed on by known weights from layer to layer, some past one, and from the word before.",
    "induction": "The word that came after this one before: a head finds it, and neurons above it say which it is.",
    "logic": "A function of two of sixteen bits, which the last word names; other pairs are worked out for nothing.",
}
_SETS = {
    EXACT: "exact",
    TRAINED: "trained",
    UNTRAINED: "hardly trained",
    WRONG: "exact, decoders of other neurons",
    RANDOM: "random",
}
_EDGES = ("Transcoders", "Neurons, %", "Edges off by", "AUROC", "Precision", "Recall", "Not by errors, %")
_CAUSAL = (
    "Transcoder",
    "Carried over, %",
    "Random, %",
    "Lost, %",
    "Others lose, %",
    "Claimed",
    "And carried over",
    "Idle claimed",
    "Probes, %",
    "Shuffled, %",
)
_EDGE_NOTE = (
    "Neurons: share that have a feature with a cosine above 0.9. Edges off by: largest difference between an edge and "
    "the products of weights along its paths, over the largest edge. AUROC: of the size of edges as a sign of which "
    "pairs of neurons, words and the logit have one. Precision and recall: of the edges that lead to the logit, each "
    "at least 1 % of its target's largest. Not by errors: influence that goes through no error. 95 % t intervals over "
    "prompts."
)
_CAUSAL_NOTE = (
    "Carried over: prompts whose answer becomes the counterpart's when the top features do (interchange accuracy), "
    "beside as many matched random features; Wilson intervals. Lost: accuracy without the top features, mean over "
    "behaviours; others lose: the largest loss of a behaviour that the features were not chosen for. Claimed: "
    "behaviours of which the rule says that removing the features costs them, beyond matched ones; idle claimed: the "
    "same of features of a variable that no answer depends on. Of any directions some do more harm than others, so "
    "this may be true of those of a random transcoder, too. And carried over: of the claimed those most of whose "
    "answers are carried over, beyond matched features; only of these may it be said that the features stand for the "
    "variable. DAS: a subspace of as many dimensions, learned on train pairs, beside a random one. Probes: test "
    "prompts whose variables a linear probe reads off the features; a probe reads idle ones, too."
)


def sections(found: Findings, draw: Draw) -> list[Section]:
    """The transformers that are set by hand; no section if there are none."""
    units = found.each(KnownCircuitResults)
    return [section(units)] if units else []


def section(units: Mapping[str, KnownCircuitResults]) -> Section:
    """What was found of each, by name."""
    verdict = line(units)
    intro = (
        "These transformers are set by hand: every weight is known, and so is every path from a word to an answer. "
        "They are run, traced and tested by the code that judges language models, with transcoders that are exact and "
        "with others to compare with."
    )
    blocks: list[Block] = [Text(verdict, strong=True), Text(intro), Terms(tuple(_terms(units)))]
    for name, results in units.items():
        ordered = {one: results.sets[one] for one in _SETS if one in results.sets}
        rows = tuple(_edge_row(one, judged) for one, judged in ordered.items())
        blocks.append(
            Table(
                f"{name}: attribution graphs of {ordered[EXACT].edges.prompts} prompts",
                _EDGES,
                rows,
                stack=False,
                note=_EDGE_NOTE,
            )
        )
        causal = tuple(_causal_row(one, judged.causal) for one, judged in ordered.items() if judged.causal)
        if causal:
            causal += _das_rows(ordered[EXACT].causal)
            blocks.append(Table(f"{name}: causal tests", _CAUSAL, causal, stack=False, note=_CAUSAL_NOTE))
    return Section("Circuits that are known to be there", tuple(blocks), lead=verdict)


def holds(results: KnownCircuitResults) -> bool:
    """Whether with exact transcoders all that is known was found, and nothing else."""
    exact = results.sets[EXACT]
    edges, causal = exact.edges, exact.causal
    found = edges.error <= _EDGE and edges.precision.mean == edges.recall.mean == edges.auroc.mean == 1
    if causal is None:
        return found
    told = causal.shown == causal.behaviours and causal.idle_claimed == 0 and not causal.harm_others
    return found and told and causal.interchange is not None and causal.interchange.mean == 1


def line(units: Mapping[str, KnownCircuitResults]) -> str:
    """The verdict in a sentence or two."""
    right = [name for name, results in units.items() if holds(results)]
    worst = max(results.sets[EXACT].edges.error for results in units.values())
    answer = "YES" if len(right) == len(units) else "NO"
    failed = ", ".join(name for name in units if name not in right)
    wrong = [
        judged.causal
        for results in units.values()
        for name, judged in results.sets.items()
        if name in (WRONG, RANDOM, UNTRAINED) and judged.causal
    ]
    learned = [results.sets[TRAINED].edges.auroc.mean for results in units.values() if TRAINED in results.sets]
    said = (
        f"Does the method find circuits that are known? {answer}, with exact transcoders: {len(right)} of {len(units)} "
        f"hand-set transformers are read without a fault, edges off by at most {significant(worst, 2)}"
    )
    said += f"; not {failed}." if failed else "."
    if wrong:
        shown, claimed = (sum(getattr(one, of) or 0 for one in wrong) for of in ("shown", "claimed"))
        said += (
            f" Of {sum(one.behaviours for one in wrong)} behaviours tested with wrong, random and hardly trained "
            f"transcoders {claimed} pass the test by removal, {shown} that and interchange."
        )
    return f"{said} With trained ones the AUROC of edges is {number(min(learned), 3)} or more." if learned else said


def _terms(units: Mapping[str, KnownCircuitResults]) -> Iterator[tuple[str, str]]:
    for name, results in units.items():
        yield (
            name,
            f"{_ABOUT[name]} {results.layers} layers, {results.neurons} neurons, {results.circuit:.0f} edges in a "
            f"circuit; right on {percent(results.accuracy)} of its prompts, logits off by "
            f"{significant(results.logit_error, 2)}.",
        )


def _edge_row(name: str, judged: JudgedSet) -> tuple[str, ...]:
    edges = judged.edges
    shares = (interval(score, 2) for score in (edges.precision, edges.recall))
    error, auroc = significant(edges.error, 2), interval(edges.auroc, 3)
    return (_SETS[name], number(100 * judged.recovered, 0), error, auroc, *shares, interval(edges.replacement, 0, 100))


def _causal_row(name: str, causal: CausalScores) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return MISSING if value is None else number(100 * value, 0)

    def count(value: int | None, of: int) -> str:
        return MISSING if value is None else f"{value} of {of}"

    return (
        _SETS[name],
        interval(causal.interchange, 0, 100) if causal.interchange else MISSING,
        share(causal.interchange_random),
        share(causal.harm),
        share(causal.harm_others),
        count(causal.claimed, causal.behaviours),
        count(causal.shown, causal.behaviours),
        count(causal.idle_claimed, causal.idle),
        interval(causal.probe, 0, 100) if causal.probe else MISSING,
        share(causal.probe_shuffled),
    )


def _das_rows(exact: CausalScores | None) -> tuple[tuple[str, ...], ...]:
    """The subspace that was learned, which needs no transcoder."""
    if exact is None or exact.das is None or exact.das_random is None:
        return ()
    blank = ("",) * (len(_CAUSAL) - 3)
    return (("none (DAS)", interval(exact.das, 0, 100), number(100 * exact.das_random, 0), *blank),)
