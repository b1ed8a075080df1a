"""The report on the dictionaries: reconstruction, sparsity and training curves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.dictionaries.kinds import KINDS, PRETRAINED
from saejax.dictionaries.names import full_name
from saejax.evaluation.results import DENSE_ABOVE, CrossLayerScores, DictionaryScores, EvaluateResults
from saejax.page.blocks import Block, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, number, percent
from saejax.stages.train import figures as report_figures
from saejax.stages.train.figures import TrainingCurve
from saejax.stages.train.metrics import read_metrics
from saejax.training.results import TrainResults

_POINTS = 400  # of a training curve; a longer one is thinned, its ends kept
_MEMBER_ROWS = 100  # longest table
# Columns of a dictionary: in every table, and where the tested one, or one that stands alone, leaves room.
_MEASURES: dict[str, Callable[[DictionaryScores], str]] = {
    "L0": lambda score: number(score.l0, 1),
    "Explained variance": lambda score: number(score.explained_variance, 3),
    "Cosine": lambda score: number(score.cosine, 3),
    "Dead": lambda score: percent(score.dead_fraction, 1),
    "Dense": lambda score: percent(score.dense_fraction, 1),
    "Nearest neighbour, median": lambda score: (
        number(score.decoder_neighbours.median, 2) if score.decoder_neighbours else MISSING
    ),
    "Cross-entropy recovered (mean)": lambda score: number(score.ce_recovered_mean, 3),
    "KL recovered (mean)": lambda score: number(score.kl_recovered_mean, 3),
}
_TERMS = (
    ("Explained variance", "share of the activations' variance that the reconstruction accounts for; 1 is perfect."),
    ("Cosine", "similarity of the activations and their reconstruction, mean over tokens; 1 is the same direction."),
    ("L0", "features active per token, on average."),
    ("Dead", "share of features that fire on no held-out token."),
    ("Dense", f"share of features that fire on more than {percent(DENSE_ABOVE)} of the tokens."),
    ("Nearest neighbour", "cosine of a feature's direction and the closest other one; near 1, the two are copies."),
    (
        "Cross-entropy recovered",
        "how well the model predicts text when the reconstruction stands in for the activations: 1 is as well as "
        "untouched, 0 as badly as with the activations' mean (or zeros) in their place.",
    ),
    ("KL recovered", "the same for the KL divergence of the model's predictions from the untouched model's."),
)
_MORE_MEASURES: dict[str, Callable[[DictionaryScores], str]] = {
    "Cross-entropy recovered (zeros)": lambda score: number(score.ce_recovered_zero, 3),
    "Cross-entropy: untouched": lambda score: number(score.ce.clean, 3),
    "Cross-entropy: reconstruction": lambda score: number(score.ce.reconstructed, 3),
    "Cross-entropy: mean": lambda score: number(score.ce.mean_ablated, 3),
    "Cross-entropy: zeros": lambda score: number(score.ce.zero_ablated, 3),
    "Held-out tokens": lambda score: f"{score.tokens:,}",
}


def scores_of(findings: Findings) -> dict[str, tuple[DictionaryScores, ...]]:
    """Return the held-out scores of the members of each kind, cross-layer transcoders left out."""
    return {kind: results.members for kind, results in findings.select(EvaluateResults).items() if results.members}


def section(findings: Findings, draw: Draw, tested: str) -> Section:
    """Return the measures, tables and figures of all dictionaries.

    Args:
      findings: the results.
      draw: saves a figure.
      tested: name of the dictionary that the causal tests use; "": there are none.
    """
    scores = scores_of(findings)
    stacks = {kind: members for kind, members in scores.items() if len(members) > 1}
    layers = {
        kind: results.cross_layer for kind, results in findings.select(EvaluateResults).items() if results.cross_layer
    }
    pictures = [_frontier(scores, draw)] if stacks else []
    curves = {
        kind: training_curves(findings.folders[f"train/{kind}"])
        for kind, trained in findings.select(TrainResults).items()
        if trained.steps  # none of what was there already
    }
    pictures += [_training(curves, draw, bool(stacks or layers))] if curves else []
    pictures += [_density(scores, draw)] if scores else []
    tables = [_table(findings, tested)] if scores else []
    columns = {"Member": lambda member: member.name} | _MEASURES
    for kind, members in stacks.items():
        tables += _long_table(f"The members of {kind}", [(member,) for member in members], columns)
    tables += [_layers_table(kind, results) for kind, results in layers.items()]
    tables += finetuning_tables(findings) + _parts_tables(scores) + _roles_tables(scores)
    # A cross-layer transcoder has no scores of single dictionaries to introduce.
    intro = _intro(scores, tested) if scores else "Trained: a cross-layer transcoder."
    blocks: tuple[Block, ...] = (Text(intro), Terms(_TERMS), *tables, *pictures)
    return Section("The dictionaries", blocks)


def _intro(scores: Mapping[str, Sequence[DictionaryScores]], tested: str) -> str:
    kinds = []
    for kind, members in scores.items():
        many = f" ({len(members)} of them)" if len(members) > 1 else ""
        about = "not trained here" if kind == PRETRAINED else f"which {KINDS[kind].about if kind in KINDS else kind}"
        kinds.append(f"{kind}{many}, {about}")
    return f"{'; '.join(kinds)}." + (f" The causal tests use {tested}." if tested else "")


def _table(findings: Findings, tested: str) -> Table:
    """Return a table with a column for every dictionary that is no member of a stack, and for the tested one."""
    shown = {
        full_name(kind, member.name): (member, findings.select(TrainResults)[kind])
        for kind, members in scores_of(findings).items()
        for member in members
        if len(members) == 1 or full_name(kind, member.name) == tested
    }
    rows = (
        *((name, *(show(score) for score, _ in shown.values())) for name, show in (_MEASURES | _MORE_MEASURES).items()),
        (
            "Training tokens (repeats counted)",
            *(f"{train.tokens:,}" if train.steps else MISSING for _, train in shown.values()),
        ),
        (
            "Training, tokens per second",
            *(number(train.tokens_per_second, 0) if train.steps else MISSING for _, train in shown.values()),
        ),
    )
    note = "Cross-entropy in nats per token. Attention sinks are left out (see below)."
    return Table("The dictionaries on held-out text", ("Measure", *shown), rows, stack=False, note=note)


def finetuning_tables(findings: Findings) -> list[Table]:
    """Return a table with a row for every dictionary that was fine-tuned through the model; none without any."""
    rows = [
        (full_name(kind, member.name), *member.finetuned)
        for kind, trained in findings.select(TrainResults).items()
        for member in trained.members
        if member.finetuned
    ]
    columns = {
        "Dictionary": lambda name, before, after: name,
        "KL divergence: before": lambda name, before, after: number(before.kl, 4),
        "KL divergence: after": lambda name, before, after: number(after.kl, 4),
        "Cross-entropy recovered (mean): before": lambda name, before, after: number(before.ce_recovered, 3),
        "Cross-entropy recovered (mean): after": lambda name, before, after: number(after.ce_recovered, 3),
    }
    note = "With the dictionary's output in the model, on held-out text; KL divergence in nats per token."
    return _long_table("Fine-tuning through the model", rows, columns, note)


def _parts_tables(scores: Mapping[str, Sequence[DictionaryScores]]) -> list[Table]:
    """Return tables with a row for every part of every crosscoder; none without crosscoders."""
    rows = [
        (full_name(kind, member.name), part, scored, member.shared)
        for kind, members in scores.items()
        for member in members
        for part, scored in (member.parts or {}).items()
    ]
    columns = {
        "Crosscoder": lambda name, part, scored, shared: name,
        "Part": lambda name, part, scored, shared: part,
        "Explained variance": lambda name, part, scored, shared: number(scored.explained_variance, 3),
        "Cross-entropy recovered (mean)": lambda name, part, scored, shared: number(scored.ce_recovered_mean, 3),
        "Private features": lambda name, part, scored, shared: f"{scored.private:,}",
        "Private and absent elsewhere": lambda name, part, scored, shared: (
            MISSING if scored.specific is None else f"{scored.specific:,}"
        ),
        "Shared features": lambda name, part, scored, shared: MISSING if shared is None else f"{shared:,}",
    }
    note = (
        "A live feature is private to a part if the relative norm of its decoder row is above 0.9 there (1: it writes "
        "to this part alone), and shared if it is between 0.4 and 0.6 (0.5: equally long in both). A penalty on "
        "activations makes private features of shared ones, so prefer batchtopk for this comparison. Private features "
        "are absent elsewhere if, by latent scaling (Minder et al., 2025), errors of the other parts hold less than "
        "0.2 and their reconstructions less than 0.5 of the feature that this part has."
    )
    return _long_table("The parts of crosscoders", rows, columns, note)


def _roles_tables(scores: Mapping[str, Sequence[DictionaryScores]]) -> list[Table]:
    """Return a table with a row for every dictionary and role of held-out chats; none without chats."""
    rows = [
        (full_name(kind, member.name), role, scored)
        for kind, members in scores.items()
        for member in members
        for role, scored in (member.roles or {}).items()
    ]
    columns = {
        "Dictionary": lambda name, role, scored: name,
        "Role": lambda name, role, scored: role,
        "Tokens": lambda name, role, scored: f"{scored.tokens:,}",
        "L0": lambda name, role, scored: number(scored.l0, 1),
        "Explained variance": lambda name, role, scored: number(scored.explained_variance, 3),
        "Dead": lambda name, role, scored: percent(scored.dead_fraction, 1),
        "Dense": lambda name, role, scored: percent(scored.dense_fraction, 1),
        "Cross-entropy recovered (mean)": lambda name, role, scored: number(scored.ce_recovered_mean, 3),
    }
    return _long_table("The messages of held-out chats, by role", rows, columns, words=("Role",))


def _long_table(
    caption: str, rows: Sequence[Any], columns: Mapping[str, Callable[..., str]], note: str = "", words: Any = ()
) -> list[Table]:
    """Return a table of the first rows, which says how many there are; none without rows."""
    cut = f"The first {_MEMBER_ROWS} of {len(rows)} rows." if len(rows) > _MEMBER_ROWS else ""
    note = " ".join(filter(None, [note, cut]))
    return [Table.of(caption, rows[:_MEMBER_ROWS], columns, words, stack=False, note=note)] if rows else []


def _layers_table(kind: str, scores: CrossLayerScores) -> Table:
    """Return a table with a row for every layer of a cross-layer transcoder."""
    columns = {
        "Layer": lambda layer: str(layer.layer),
        **{name: _MEASURES[name] for name in ("Explained variance", "Cosine", "L0", "Dead", "Dense")},
    }
    rows = [(layer,) for layer in scores.layers]
    note = (
        f"All MLPs replaced at once: cross-entropy {number(scores.ce.reconstructed, 3)} nats per token on "
        f"{scores.ce.tokens:,}; untouched {number(scores.ce.clean, 3)}, with means in their place "
        f"{number(scores.ce.mean_ablated, 3)}, with nothing {number(scores.ce.zero_ablated, 3)}; recovered "
        f"{number(scores.ce_recovered_mean, 3)} of cross-entropy and {number(scores.kl_recovered_mean, 3)} of KL. Mean "
        f"explained variance {number(scores.explained_variance, 3)} with {number(scores.l0, 0)} features a token."
    )
    return Table.of(f"The layers of the cross-layer transcoder ({kind})", rows, columns, stack=False, note=note)


def _frontier(scores: Mapping[str, Sequence[DictionaryScores]], draw: Draw) -> Picture:
    """Return the sparsity-fidelity figure of all dictionaries, each kind in lines of one site."""
    points: dict[str, list[list[DictionaryScores]]] = {}
    for kind, members in scores.items():
        sites: dict[tuple[str, str], list[DictionaryScores]] = {}
        for member in members:
            sites.setdefault((member.site, member.target), []).append(member)
        points[kind] = list(sites.values())
    silent = sum(member.l0 == 0 for members in scores.values() for member in members)
    left_out = f" Not drawn, because no feature is ever active: {silent}." if silent else ""
    caption = (
        "Sparsity against fidelity, on held-out text. Each point is a dictionary; higher and further left is better. A "
        "line joins the dictionaries of one kind and site that no other of these beats in both; those that are beaten "
        f"are pale.{left_out}"
    )
    best = " ".join(
        f"{kind}: explained variance {_range([member.explained_variance for member in members], 3)} at L0 "
        f"{_range([member.l0 for member in members], 0)}."
        for kind, members in scores.items()
    )
    return draw("frontier", report_figures.frontier(points), caption, f"Explained variance rises with L0. {best}")


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (number(of(values), digits) for of in (min, max))
    return low if low == high else f"{low} to {high}"


def _training(curves: Mapping[str, Sequence[TrainingCurve]], draw: Draw, stacks: bool) -> Picture:
    last = {kind: [curve.explained_variance[-1] for curve in of_kind] for kind, of_kind in curves.items() if of_kind}
    band = " Of a stack: the median of its members, and the band between the least and the greatest."
    caption = "Training curves, on training batches; L0 on a logarithmic axis." + (band if stacks else "")
    final = " ".join(f"{kind}: {_range(values, 2)}." for kind, values in last.items())
    alt = f"Explained variance rises with training tokens. On the last batch: {final}"
    return draw("training", report_figures.training(curves), caption, alt)


def _density(scores: Mapping[str, Sequence[DictionaryScores]], draw: Draw) -> Picture:
    histograms = {kind: [member.density_histogram for member in members] for kind, members in scores.items()}
    never = " ".join(
        f"{kind}: {_range([histogram.never for histogram in histograms_of_kind], 0)} never fire."
        for kind, histograms_of_kind in histograms.items()
    )
    mean = (
        " Of a stack: the mean over its members."
        if any(len(histograms_of_kind) > 1 for histograms_of_kind in histograms.values())
        else ""
    )
    return draw(
        "density",
        report_figures.density(histograms),
        f"Feature density: how many features fire on what share of held-out tokens.{mean}",
        f"Histogram of the features' firing rates on held-out tokens. {never}",
    )


def training_curves(unit: Path) -> list[TrainingCurve]:
    """Return the training curve of every member of a unit; a ``UserError`` if its file is missing or damaged."""
    names = ("tokens", "explained_variance", "l0")
    points: dict[str, list[list[float]]] = {}
    for record in read_metrics(unit, names):
        points.setdefault(record["member"], []).append([record[name] for name in names])
    curves = []
    for of_member in points.values():
        # Evenly spaced records keep the shape of the curve, and both of its ends.
        keep = np.unique(np.linspace(0, len(of_member) - 1, min(len(of_member), _POINTS)).round().astype(int))
        curves.append(TrainingCurve(*zip(*(of_member[i] for i in keep), strict=True)))
    return curves
