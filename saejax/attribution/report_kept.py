"""The report on circuits of equal numbers of features: ours beside circuit-tracer's order."""

from collections.abc import Sequence

from saejax.attribution.checks.kept import SCORES
from saejax.attribution.report_graphs import ReportedGraph
from saejax.attribution.results import KeptResults
from saejax.page.blocks import Block, Terms
from saejax.page.tables import Table, interval, percent

_EARLIER = dict(elimination="effect", mixed="size")  # orders of results of earlier versions


def kept_blocks(graphs: Sequence[ReportedGraph]) -> list[Block]:
    """A table of CPR and CMD of the orders, and why some have none; nothing where none was asked for."""
    measured = {graph.name: graph.results.kept for graph in graphs if graph.results.kept}
    rows = tuple(
        (
            name,
            f"{kept.prompts}",
            kind.upper(),
            interval(score.effect, 3),
            interval(score.influence, 3),
            interval(score.difference, 3),
            interval(score.random, 3),
            *(_at(kept, order, share) for share in (0.02, 0.2) for order in (SCORES[kind], "influence")),
        )
        for name, kept in measured.items()
        for kind, score in kept.scores.items()
    )
    blocks: list[Block] = []
    if rows:
        note = (
            "Of the features that are active in a prompt the first 0.1 to 100 % of an order are kept, the others set "
            "to 0, and errors stay. Faithfulness f is the share of the answer, above that without any feature, which "
            "the kept ones restore. CPR: the area under it over the share of features; higher is better, more than 1 "
            "is possible. CMD: the area between it and 1; 0 is best (Mueller et al., 2025). By effect: what adds "
            "least to the answer goes first, a tenth at a time, and effects are taken anew with what is left; for CMD "
            "by the better of a feature's places in this order and the next. By influence: circuit-tracer's rule. "
            "95 % intervals resample prompts, of the difference in pairs; random orders: mean, least and largest."
        )
        columns = (
            "Graph", "Prompts", "Score", "By effect", "By influence", "Difference", "Random",
            "f at 2 %, effect", "influence", "f at 20 %, effect", "influence",
        )  # fmt: skip
        blocks.append(
            Table("Circuits of equal numbers of features", columns, rows, frozenset({2}), stack=False, note=note)
        )
    if without := [
        (name, f"orders are not compared: {kept.reason}.") for name, kept in measured.items() if kept.reason
    ]:
        blocks.append(Terms(tuple(without)))
    return blocks


def _at(kept: KeptResults, order: str, share: float) -> str:
    """Faithfulness of a share of the features."""
    found = kept.faithfulness.get(order) or kept.faithfulness[_EARLIER[order]]
    return percent(found[kept.share.index(share)])
