"""The report's section on transformers set by hand: what graphs and causal tests recover."""

from collections.abc import Iterator, Mapping

from saejax.ground_truth.circuits.dictionaries import EXACT, RANDOM, TRAINED, UNTRAINED, WRONG
from saejax.ground_truth.results import CausalScores, JudgedSet, KnownCircuitResults
from saejax.page.blocks import Block, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent, significant

_EDGE = 1e-5  # largest relative error of an edge
_ABOUT = {
    "chain": "Features are passed on by known weights, some past a layer, and from the word before.",
    "induction": "The word that followed this one before: a head finds it, and neurons of the layer above name it.",
    "logic": "A function of two of sixteen bits, which the last word asks for; other pairs are computed for nothing.",
}
_SETS = {
    EXACT: "exact",
    TRAINED: "trained",
    UNTRAINED: "almost untrained",
    WRONG: "exact, decoders permuted",
    RANDOM: "random",
}
_EDGES = ("Transcoders", "Neurons, %", "Edge error", "AUROC", "Precision", "Recall", "Replacement score, %")
_CAUSAL = (
    "Transcoder",
    "Interchange, %",
    "Random, %",
    "Accuracy drop, %",
    "Others' drop, %",
    "Ablation effect",
    "And interchange",
    "Idle variables",
    "Probes, %",
    "Shuffled, %",
)
_EDGE_NOTE = (
    "Neurons: share with a feature of cosine above 0.9. Edge error: largest difference between an edge and the "
    "products of weights along its paths, relative to the largest edge. AUROC: edge size as a predictor of which "
    "pairs of neurons, words and the logit have an edge. Precision and recall: of the edges that lead to the logit, "
    "each at least 1 % of its target's largest. Replacement score: influence that passes through no error node. 95 % "
    "t intervals over prompts."
)
_CAUSAL_NOTE = (
    "Interchange: prompts whose answer becomes the counterpart's when the top features are patched from it "
    "(interchange accuracy), and the same of random sets of as many features; Wilson intervals. Accuracy drop: fall of "
    "two-way accuracy when the top features are ablated, mean over behaviours; others' drop: the largest of a "
    "behaviour that the features were not selected for. Ablation effect: behaviours whose two-way accuracy falls when "
    "the top features are ablated; idle variables: the same for features of a variable that no answer depends on. Some "
    "directions always have more effect than others, so a random transcoder may pass this test. And interchange: of "
    "these, behaviours in which patching carries most answers over; only then do the features represent the variable. "
    "Probes: accuracy of linear probes of the variables on test prompts; probes read idle variables, too."
)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on the transformers set by hand; none if there are none."""
    units = findings.each(KnownCircuitResults)
    return [section(units)] if units else []


def section(units: Mapping[str, KnownCircuitResults]) -> Section:
    """Return the section, with two tables for each transformer."""
    verdict = line(units)
    intro = (
        "The weights of these transformers are set by hand, so every path from a word to an answer is known. They "
        "are run, traced and tested by the code for language models, with exact transcoders and with others for "
        "comparison."
    )
    blocks: list[Block] = [Text(verdict, strong=True), Text(intro), Terms(tuple(_terms(units)))]
    for name, results in units.items():
        ordered = {kind: results.sets[kind] for kind in _SETS if kind in results.sets}
        rows = tuple(_edge_row(kind, judged) for kind, judged in ordered.items())
        blocks.append(
            Table(
                f"{name}: attribution graphs of {ordered[EXACT].edges.prompts} prompts",
                _EDGES,
                rows,
                stack=False,
                note=_EDGE_NOTE,
            )
        )
        causal = tuple(_causal_row(kind, judged.causal) for kind, judged in ordered.items() if judged.causal)
        if causal:
            blocks.append(Table(f"{name}: causal tests", _CAUSAL, causal, stack=False, note=_CAUSAL_NOTE))
    return Section("Known circuits", tuple(blocks), lead=verdict)


def holds(results: KnownCircuitResults) -> bool:
    """Return whether exact transcoders recover everything that is known, and nothing else."""
    exact = results.sets[EXACT]
    edges, causal = exact.edges, exact.causal
    edges_recovered = edges.error <= _EDGE and edges.precision.mean == edges.recall.mean == edges.auroc.mean == 1
    if causal is None:
        return edges_recovered
    ablation_recovered = causal.shown == causal.behaviours and causal.idle_claimed == 0 and not causal.harm_others
    return edges_recovered and ablation_recovered and causal.interchange is not None and causal.interchange.mean == 1


def line(units: Mapping[str, KnownCircuitResults]) -> str:
    """Return the verdict in a sentence or two."""
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
    text = (
        f"Are known circuits recovered? {answer}, with exact transcoders: {len(right)} of {len(units)} hand-set "
        f"transformers are recovered exactly, with edge errors of at most {significant(worst, 2)}"
    )
    text += f"; not {failed}." if failed else "."
    if wrong:
        shown, claimed = (sum(getattr(causal, of) or 0 for causal in wrong) for of in ("shown", "claimed"))
        text += (
            f" Of {sum(causal.behaviours for causal in wrong)} behaviours tested with permuted, random and almost "
            f"untrained transcoders {claimed} pass the ablation test, {shown} ablation and interchange."
        )
    return f"{text} With trained ones the AUROC of edges is at least {number(min(learned), 3)}." if learned else text


def _terms(units: Mapping[str, KnownCircuitResults]) -> Iterator[tuple[str, str]]:
    for name, results in units.items():
        yield (
            name,
            f"{_ABOUT[name]} {results.layers} layers, {results.neurons} neurons, {results.circuit:.0f} edges in a "
            f"circuit; accuracy {percent(results.accuracy)}, largest relative error of its logits "
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
