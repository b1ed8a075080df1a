"""The report on transformers that were trained on algorithms."""

from collections.abc import Iterator

from saejax.ground_truth.algorithms.results import AlgorithmResults, EdgeCurves, PlantedScores
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent

_EDGES = 0.95  # AUROC of edges that is asked for
_SIZES = 4  # of circuits whose f is shown
_PUT_IN = dict(
    trained="features, trained",
    untrained="features, hardly trained",
    random="features, random",
    DAS="learned subspace (DAS)",
)


def sections(found: Findings, draw: Draw) -> list[Section]:
    """What the transformers can do; no section if none was trained."""
    units = found.each(AlgorithmResults)
    if not units:
        return []
    short = [sort for one in units.values() for sort, share in one.accuracy.items() if share.mean < one.wanted[sort]]
    verdict = (
        f"Of the algorithms {', '.join(short)} was not learned as well as asked for."
        if short
        else "Every algorithm was learned as well as asked for, on questions that training never had."
    )
    rows = tuple(
        (
            sort,
            interval(share, 2, 100),
            percent(one.wanted[sort]),
            f"{one.fresh:,}",
            f"{one.steps:,}",
            number(one.seconds, 0),
        )
        for one in units.values()
        for sort, share in one.accuracy.items()
    )
    columns = ("Questions", "Right, %", "Asked for", "Fresh", "Steps", "Seconds")
    table = Table("Transformers trained on algorithms, with 95 % Wilson intervals", columns, rows)
    planted = [one.planted for one in units.values() if one.planted]
    blocks = (Text(verdict, strong=True), table, *(block for one in planted for block in _planted(one)))
    return [Section("Algorithms that were trained", blocks, lead=verdict)]


def _planted(scores: PlantedScores) -> Iterator[Block]:
    """What graphs and interchange say of a planted circuit."""
    control = max((score.mean for name, score in scores.auroc.items() if name != "trained"), default=0.0)
    auroc, strongest = interval(scores.auroc["trained"], 3), interval(scores.strongest["trained"], 0, 100)
    yield Text(
        f"Attribution graphs tell the planted circuit's edges with an AUROC of {auroc} ({_EDGES:g} was asked for), "
        f"over {scores.prompts} prompts; with transcoders that know nothing of it {number(control, 3)}. Of their five "
        f"strongest edges {strongest} % are planted.",
        strong=True,
    )
    rows = tuple(
        (name, interval(score, 3), interval(scores.strongest[name], 0, 100)) for name, score in scores.auroc.items()
    )
    yield Table(
        "Planted circuit: edges of graphs, with 95 % t intervals over prompts",
        ("Transcoders", "AUROC", "Planted of the strongest five, %"),
        rows,
        note="Edges between words, MLPs at a word and the logit, by the influence that goes through them. Most of them "
        "have none, whatever the transcoders: the AUROC is high for random ones, too.",
    )
    if scores.circuits:
        yield _circuits(scores.circuits)
    carried = tuple(
        (
            behaviour,
            _PUT_IN.get(name, name),
            f"{one.size}",
            interval(one.share, 0, 100),
            MISSING if one.random is None else number(100 * one.random, 0),
        )
        for behaviour, methods in scores.carried.items()
        for name, one in methods.items()
    )
    columns = ("Changed", "Put in", "Features or dimensions", "Carried over, %", "Random, %")
    yield Table(
        "Planted circuit: what carries the answer over at the MLP of layer 0",
        columns,
        carried,
        note="That MLP has whether the first two bits differ (differ), and must not carry the third one (third). Top "
        "features of trained, hardly trained and random transcoders, neurons, a learned subspace (DAS), and the whole "
        "site, chosen or learned on train pairs and tried on others; 95 % Wilson intervals.",
    )


def _circuits(found: EdgeCurves) -> Table:
    """CPR and CMD of circuits of more and more edges."""
    rows = tuple(
        (
            f"graphs, {name} transcoders" if name in found.alone else name,
            interval(curve.cpr, 3),
            interval(curve.cmd, 3),
            *map(percent, curve.faithfulness[:_SIZES]),
            interval(found.alone[name], 0, 100) if name in found.alone else MISSING,
        )
        for name, curve in found.curves.items()
    )
    columns = ("Order", "CPR", "CMD", *(f"f of {size}" for size in found.sizes[:_SIZES]), "By features alone, %")
    return Table(
        f"Planted circuit: what circuits of the first edges carry, on {found.prompts} prompts that were not traced",
        columns,
        rows,
        stack=False,
        note=f"The scores of MIB (Mueller et al., 2025), for the {found.edges} edges that there can be between words, "
        "MLPs at a position and the logit: those outside of a circuit carry what they do in the counterpart's run. f: "
        "the share of the logit difference that is left, 0 without edges and 1 with all. CPR: the area under f over "
        "the share of edges, 1 is best; CMD: the area between f and 1, 0 is best; prompts are resampled for 95 % "
        "intervals, and of random edges these are the middle 95 % of the draws. By features alone: f of all edges "
        "where an MLP gives what its features predict, and the errors of the counterpart's run.",
    )
