"""The report's section on the dictionaries: how well they rebuild what they read, and how sparsely."""

from collections.abc import Mapping, Sequence
from typing import Any

from saejax.dictionaries.kinds import KINDS
from saejax.dictionaries.stacks import full_name
from saejax.reporting import dictionary_figures
from saejax.reporting.document import Block, Picture, Section, Terms, Text
from saejax.reporting.findings import Findings
from saejax.reporting.sections import Draw
from saejax.reporting.tables import MISSING, Table, number, percent

_MEMBER_ROWS = 100  # longest list of a stack's members
Scores = Mapping[str, Any]


def section(found: Findings, draw: Draw) -> Section:
    """The measures, tables and figures of all dictionaries."""
    dense_above = found.settings()["evaluate"]["dense_above"]
    stacks = {kind: members for kind, members in found.scores.items() if len(members) > 1}
    pictures = [_frontier(stacks, found, draw)] if stacks else []
    pictures += [_training(found, draw), _density(found, draw, dense_above)]
    tables = [_table(found), *(_members_table(kind, members) for kind, members in stacks.items())]
    blocks: tuple[Block, ...] = (Text(_intro(found)), Terms(_terms(dense_above)), *tables, *pictures)
    return Section("The dictionaries", blocks)


def _intro(found: Findings) -> str:
    kinds = []
    for kind, members in found.scores.items():
        many = f" ({len(members)} of them)" if len(members) > 1 else ""
        kinds.append(f"{kind}{many}, which {KINDS[kind].about if kind in KINDS else kind}")
    return f"Trained: {'; '.join(kinds)}. The causal tests use {found.ablate['dictionary']}."


def _terms(dense_above: float) -> tuple[tuple[str, str], ...]:
    return (
        (
            "Explained variance",
            "share of the activations' variance that the reconstruction accounts for; 1 is perfect.",
        ),
        (
            "Cosine",
            "similarity of the activations and their reconstruction, mean over tokens; 1 is the same direction.",
        ),
        ("L0", "features active per token, on average."),
        ("Dead", "share of features that fire on no held-out token."),
        ("Dense", f"share of features that fire on more than {percent(dense_above)} of the tokens."),
        (
            "Nearest neighbour",
            "cosine similarity of a feature's direction and the closest other one; near 1, the two are copies.",
        ),
        (
            "Cross-entropy recovered",
            "how well the model predicts text when the reconstruction stands in for the activations: 1 is as well as "
            "untouched, 0 as badly as with the activations' mean (or zeros) in their place.",
        ),
        ("KL recovered", "the same for the KL divergence of the model's predictions from the untouched model's."),
    )


def _table(found: Findings) -> Table:
    """A column for every dictionary that stands alone, and for the one that was tested."""
    shown = {
        full_name(kind, member["name"]): (member, found.trained[kind])
        for kind, members in found.scores.items()
        for member in members
        if len(members) == 1 or full_name(kind, member["name"]) == found.ablate["dictionary"]
    }
    scores, trained = [member for member, _ in shown.values()], [train for _, train in shown.values()]
    rows = (
        ("Explained variance", *(number(score["explained_variance"], 3) for score in scores)),
        ("Cosine", *(number(score["cosine"], 3) for score in scores)),
        ("L0", *(number(score["l0"], 1) for score in scores)),
        ("Dead", *(percent(score["dead_fraction"], 1) for score in scores)),
        ("Dense", *(percent(score["dense_fraction"], 1) for score in scores)),
        ("Nearest neighbour, median", *(_neighbour(score, "median") for score in scores)),
        ("Cross-entropy recovered (mean)", *(number(score["ce_recovered_mean"], 3) for score in scores)),
        ("Cross-entropy recovered (zeros)", *(number(score["ce_recovered_zero"], 3) for score in scores)),
        ("KL recovered (mean)", *(number(score["kl_recovered_mean"], 3) for score in scores)),
        ("Cross-entropy: untouched", *(number(score["ce"]["clean"], 3) for score in scores)),
        ("Cross-entropy: reconstruction", *(number(score["ce"]["reconstructed"], 3) for score in scores)),
        ("Cross-entropy: mean", *(number(score["ce"]["mean_ablated"], 3) for score in scores)),
        ("Cross-entropy: zeros", *(number(score["ce"]["zero_ablated"], 3) for score in scores)),
        ("Held-out tokens", *(f"{score['tokens']:,}" for score in scores)),
        ("Training tokens (repeats counted)", *(f"{train['tokens']:,}" for train in trained)),
        ("Training, tokens per second", *(number(train["tokens_per_second"], 0) for train in trained)),
    )
    note = "Cross-entropy in nats per token. Attention sinks are left out (see below)."
    return Table("The dictionaries on held-out text", ("Measure", *shown), rows, stack=False, note=note)


def _members_table(kind: str, members: Sequence[Scores]) -> Table:
    """A row for every member of a stack."""
    rows = tuple(
        (
            member["name"],
            number(member["l0"], 1),
            number(member["explained_variance"], 3),
            number(member["cosine"], 3),
            number(member["ce_recovered_mean"], 3),
            number(member["kl_recovered_mean"], 3),
            percent(member["dead_fraction"], 1),
            percent(member["dense_fraction"], 1),
            _neighbour(member, "median"),
        )
        for member in members[:_MEMBER_ROWS]
    )
    columns = (
        "Member",
        "L0",
        "Explained variance",
        "Cosine",
        "Cross-entropy recovered",
        "KL recovered",
        "Dead",
        "Dense",
        "Nearest neighbour",
    )
    rest = f" The first {_MEMBER_ROWS} of {len(members)} members." if len(members) > _MEMBER_ROWS else ""
    note = f"Recovered against the mean. Nearest neighbour: median over the features.{rest}"
    return Table(f"The members of {kind}", columns, rows, stack=False, note=note)


def _neighbour(scores: Scores, key: str) -> str:
    neighbours = scores["decoder_neighbours"]
    return number(neighbours[key], 2) if neighbours else MISSING


def _frontier(stacks: Mapping[str, Sequence[Scores]], found: Findings, draw: Draw) -> Picture:
    """All dictionaries, those that stand alone as well, each kind in lines of one site."""
    points: dict[str, list[list[dict[str, float | None]]]] = {}
    silent = 0
    for kind, members in found.scores.items():
        sites: dict[tuple[str, str], list[dict[str, float | None]]] = {}
        for member in members:
            silent += member["l0"] == 0
            point = {key: member[key] for key in ("l0", "explained_variance")}
            sites.setdefault((member["site"], member["target"]), []).append(
                point | dict(ce_recovered=member["ce_recovered_mean"])
            )
        points[kind] = list(sites.values())
    left_out = f" Not drawn, because no feature is ever active: {silent}." if silent else ""
    caption = (
        "Sparsity against fidelity, on held-out text. Each point is a dictionary; higher and further left is better. A "
        "line joins the dictionaries of one kind and site that no other of these beats in both; those that are beaten "
        f"are pale.{left_out}"
    )
    best = " ".join(
        f"{kind}: explained variance {_range(members, 'explained_variance', 3)} at L0 {_range(members, 'l0', 0)}."
        for kind, members in found.scores.items()
    )
    return draw("frontier", dictionary_figures.frontier(points), caption, f"Explained variance rises with L0. {best}")


def _range(members: Sequence[Scores], key: str, digits: int) -> str:
    low, high = (number(of(member[key] for member in members), digits) for of in (min, max))
    return low if low == high else f"{low} to {high}"


def _training(found: Findings, draw: Draw) -> Picture:
    final = " ".join(f"{kind}: {_final(curves)}." for kind, curves in found.curves.items() if curves)
    band = " Of a stack: the median of its members, and the band between the least and the greatest."
    caption = "Training curves, on training batches; L0 on a logarithmic axis." + (band if found.has_stacks else "")
    alt = f"Explained variance rises with training tokens. On the last batch: {final}"
    return draw("training", dictionary_figures.training(found.curves), caption, alt)


def _final(curves: Sequence[Mapping[str, Sequence[float]]]) -> str:
    return _range([dict(last=curve["explained_variance"][-1]) for curve in curves], "last", 2)


def _density(found: Findings, draw: Draw, dense_above: float) -> Picture:
    histograms = {kind: [member["density_histogram"] for member in members] for kind, members in found.scores.items()}
    never = " ".join(f"{kind}: {_range(own, 'never', 0)} never fire." for kind, own in histograms.items())
    mean = " Of a stack: the mean over its members." if found.has_stacks else ""
    return draw(
        "density",
        dictionary_figures.density(histograms, dense_above),
        f"Feature density: how many features fire on what share of held-out tokens.{mean}",
        f"Histogram of the features' firing rates on held-out tokens. {never}",
    )
