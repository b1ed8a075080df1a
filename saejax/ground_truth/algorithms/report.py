"""The report on transformers that were trained on algorithms."""

from collections.abc import Iterator

from saejax.ground_truth.algorithms.results import AlgorithmResults, PlantedScores
from saejax.page.document import Block, Section, Text
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent

_EDGES = 0.95  # AUROC of edges that is asked for


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
    trained = scores.auroc["trained"]
    found = "is" if trained.mean >= _EDGES else "is not"
    yield Text(
        f"The planted circuit {found} found by attribution graphs: with trained transcoders the AUROC of edges is "
        f"{interval(trained, 3)} ({_EDGES:g} was asked for), over {scores.prompts} prompts.",
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
    carried = tuple(
        (
            behaviour,
            name,
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
