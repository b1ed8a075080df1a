"""The report's section on transformers set by hand: what graphs and causal tests recover."""

from collections.abc import Mapping

from saejax.ground_truth.circuits.dictionaries import EXACT, RANDOM, TRAINED, WRONG
from saejax.ground_truth.results import JudgedSet, KnownCircuitResults
from saejax.page.blocks import Block, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, interval, number, significant

_EDGE = 1e-5  # largest relative error of an edge
_ABOUT = {
    "induction": "The word that followed this one before: a head finds it, and neurons of the layer above name it.",
    "logic": "A function of two of sixteen bits, which the last word asks for; other pairs are computed for nothing.",
}
_SETS = {EXACT: "exact", TRAINED: "trained", WRONG: "exact, decoders permuted", RANDOM: "random"}
_EDGE_NOTE = (
    "Neurons: share with a feature of cosine above 0.9. Edge error: largest difference between an edge and the "
    "products of weights along its paths, relative to the largest edge. AUROC: edge size as a predictor of which "
    "pairs of neurons, words and the logit have an edge. Precision and recall: of the edges that lead to the logit, "
    "each at least 1 % of its target's largest. Replacement score: influence that passes through no error node. 95 % "
    "t intervals over prompts."
)
_CAUSAL_NOTE = (
    "Interchange: prompts whose answer becomes the counterpart's when the top features are patched from it "
    "(interchange accuracy), with Wilson intervals, and the same of random lists of other features to the same dose. "
    "Accuracy lost: two-way accuracy that ablation of the top features costs, and ablation of such lists. Ablation "
    "effect: behaviours whose accuracy falls; idle variables: the same for features of a variable that no answer "
    "depends on. Some directions always have more effect than others, so a random transcoder may pass this test. And "
    "interchange: of these, behaviours in which patching carries over most answers, and more answers than 95 % of "
    "the lists (where a list reaches the dose); only then do the features represent the variable."
)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on the transformers set by hand, with two tables for each; none if there are none."""
    units = findings.select(KnownCircuitResults)
    if not units:
        return []
    verdict = line(units)
    intro = (
        "The weights of these transformers are set by hand, so every path from a word to an answer is known. They "
        "are run, traced and tested by the code for language models, with exact transcoders and with others for "
        "comparison."
    )
    terms = [
        (name, f"{_ABOUT[name]} {results.layers} layers, {results.neurons} neurons.") for name, results in units.items()
    ]
    blocks: list[Block] = [Text(verdict, strong=True), Text(intro), Terms(tuple(terms))]
    for name, results in units.items():
        ordered = {kind: results.sets[kind] for kind in _SETS}
        blocks += [_edges_table(name, ordered), _causal_table(name, ordered)]
    return [Section("Known circuits", tuple(blocks), lead=verdict)]


def holds(results: KnownCircuitResults) -> bool:
    """Return whether exact transcoders recover everything that is known, and nothing else."""
    exact = results.sets[EXACT]
    edges, causal = exact.edges, exact.causal
    edges_recovered = edges.error <= _EDGE and edges.precision.mean == edges.recall.mean == edges.auroc.mean == 1
    variables_recovered = causal.shown == causal.behaviours and causal.idle_claimed == 0
    return edges_recovered and variables_recovered and causal.interchange.mean == 1


def line(units: Mapping[str, KnownCircuitResults]) -> str:
    """Return the verdict in a sentence or two."""
    right = [name for name, results in units.items() if holds(results)]
    worst = max(results.sets[EXACT].edges.error for results in units.values())
    answer = "YES" if len(right) == len(units) else "NO"
    failed = ", ".join(name for name in units if name not in right)
    wrong = [results.sets[kind].causal for results in units.values() for kind in (WRONG, RANDOM)]
    shown, claimed = (sum(getattr(causal, of) for causal in wrong) for of in ("shown", "claimed"))
    least = min(results.sets[TRAINED].edges.auroc.mean for results in units.values())
    return (
        f"Are known circuits recovered? {answer}, with exact transcoders: {len(right)} of {len(units)} hand-set "
        f"transformers are recovered exactly, with edge errors of at most {significant(worst, 2)}"
        + (f"; not {failed}." if failed else ".")
        + f" Of {sum(causal.behaviours for causal in wrong)} behaviours tested with permuted and random transcoders "
        f"{claimed} pass the ablation test, {shown} ablation and interchange. With trained ones the AUROC of edges is "
        f"at least {number(least, 3)}."
    )


def _edges_table(name: str, sets: Mapping[str, JudgedSet]) -> Table:
    columns = {
        "Transcoders": lambda kind, judged: _SETS[kind],
        "Neurons, %": lambda kind, judged: number(100 * judged.recovered, 0),
        "Edge error": lambda kind, judged: significant(judged.edges.error, 2),
        "AUROC": lambda kind, judged: interval(judged.edges.auroc, 3),
        "Precision": lambda kind, judged: interval(judged.edges.precision, 2),
        "Recall": lambda kind, judged: interval(judged.edges.recall, 2),
        "Replacement score, %": lambda kind, judged: interval(judged.edges.replacement, 0, 100),
    }
    caption = f"{name}: attribution graphs of {sets[EXACT].edges.prompts} prompts"
    return Table.of(caption, sets.items(), columns, stack=False, note=_EDGE_NOTE)


def _causal_table(name: str, sets: Mapping[str, JudgedSet]) -> Table:
    columns = {
        "Transcoder": lambda kind, causal: _SETS[kind],
        "Interchange, %": lambda kind, causal: interval(causal.interchange, 0, 100),
        "Random, %": lambda kind, causal: number(causal.interchange_random, 0, 100),
        "Accuracy lost; random, %": lambda kind, causal: (
            f"{number(causal.accuracy_drop, 0, 100)}; {number(causal.accuracy_drop_random, 0, 100)}"
        ),
        "Ablation effect": lambda kind, causal: f"{causal.claimed} of {causal.behaviours}",
        "And interchange": lambda kind, causal: f"{causal.shown} of {causal.behaviours}",
        "Idle variables": lambda kind, causal: f"{causal.idle_claimed} of {causal.idle}",
    }
    rows = [(kind, judged.causal) for kind, judged in sets.items()]
    return Table.of(f"{name}: causal tests", rows, columns, stack=False, note=_CAUSAL_NOTE)
