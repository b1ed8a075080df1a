"""The report on activation patching: a heatmap of each kind of site, and interchange accuracy of features."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from saejax.interventions.answers import fooled_sentence
from saejax.interventions.patching import (
    DIRECTIONS,
    EACH,
    FeaturePatchResults,
    PatchedSites,
    PatchGrid,
    SitePatchResults,
)
from saejax.interventions.published_heads import PublishedHead
from saejax.interventions.table import TESTED
from saejax.models.sites import HEAD_KINDS
from saejax.page import style
from saejax.page.blocks import Block, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, answer, interval, number, percent
from saejax.page.words import WEAK, behaviour
from saejax.unicode import visible_token
from saejax.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 12  # characters of a token below a column
_TITLES = dict(denoising="denoising: prompt into counterpart", noising="noising: counterpart into prompt")

_INTRO = (
    "Denoising puts a value of the prompt's run into the counterpart's run; its effect is the rise of the logit "
    "difference of the prompt's answers. Noising puts a value of the counterpart's run into the prompt's run; its "
    "effect is the drop. The largest of many effects is large by chance, too: the interval of each is in the unit's "
    "file <behaviour>-patching.parquet."
)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return the section on patching; none if nothing was patched."""
    blocks: list[Block] = []
    weak: dict[str, str] = {}
    for unit, summary in findings.summaries.items():
        results = summary.results
        if isinstance(results, SitePatchResults):
            for name, result in results.behaviours.items():
                grid = PatchGrid.load(PatchGrid.file(findings.folders[unit], name))
                blocks.append(_picture(results, name, findings.title(name), result, grid, draw))
                blocks += [_published_table(result.published)] if result.published else []
        elif isinstance(results, FeaturePatchResults):
            blocks += [_carried_table(results, findings), Terms(tuple(_answers(results, findings).items()))]
        else:
            continue
        weak |= findings.weak(results.behaviours)
        if results.unpatched:
            reasons = results.unpatched.items()
            blocks.append(Terms(tuple((behaviour(name), f"not patched: {reason}.") for name, reason in reasons)))
    if any(isinstance(block, Picture) for block in blocks):
        blocks.insert(0, Text(_INTRO))
    if weak:
        blocks.append(Text(WEAK))
    return [Section("Activation patching", tuple(blocks))] if blocks else []


def _picture(
    results: SitePatchResults, name: str, title: str, result: PatchedSites, grid: PatchGrid, draw: Draw
) -> Picture:
    scale = "as a share of clean - corrupted" if result.is_normalised else "in logits"
    where, labels = f"of one {'head' if results.kind in HEAD_KINDS else 'layer'} at", ""
    if results.positions == EACH:
        where += " one position"
        labels = (
            " Positions are counted from the end and labelled with their most frequent token; labels are bold where "
            "prompt and counterpart differ."
        )
    else:
        where += f" positions {results.positions} together"
    caption = (
        f"{title}: {results.kind} {where} is replaced by its value in the other run, on "
        f"{counted(result.prompts, 'pair')} of prompts. Colour is the mean effect on the logit difference, {scale}."
        f"{labels}"
    )
    if not result.is_normalised:
        caption += (
            " Not normalised: the model's logit difference does not clearly fall from the prompts to their "
            "counterparts, so that there is nothing to divide effects by."
        )
    return draw(f"patching-{results.kind}-{name}", heatmap(grid, result), caption, f"Patching. {caption}")


@style.styled
def heatmap(grid: PatchGrid, result: PatchedSites) -> "Figure":
    """Draw the effect of every layer and position, or head, a panel for each direction."""
    value = "normalised" if result.is_normalised else "effect"
    matrices = {direction: grid.matrix(value, direction) for direction in DIRECTIONS}
    layers, columns = matrices["noising"].shape
    limit = 1.0 if value == "normalised" else float(np.nanmax(np.abs(list(matrices.values())), initial=1e-6))
    height, has_positions = 0.9 + 0.055 * layers + 0.4, not np.isnan(grid.position.astype(float)).all()
    figure, below = style.panels([height, height], [_TITLES[direction] for direction in DIRECTIONS])
    for axes, matrix in zip(below, matrices.values(), strict=True):
        image = axes.imshow(
            matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto", interpolation="nearest"
        )
        axes.set_ylabel("layer")
        if has_positions:
            size = min(9.0, 190 / columns)  # points: labels of neighbours do not touch
            tokens = [style.drawable(visible_token(column.token)) for column in result.columns]
            labels = [token if len(token) <= _LONGEST else f"{token[: _LONGEST - 1]}…" for token in tokens]
            axes.set_xticks(range(columns), labels, rotation=90, size=size)
            for text, column in zip(axes.get_xticklabels(), result.columns, strict=True):
                text.set_fontweight("bold" if column.differs else "normal")
        elif columns > 1:
            axes.set_xlabel("head")
        else:
            axes.set_xticks([])
        axes.tick_params(axis="x", length=2)
    figure.colorbar(image, ax=below, shrink=0.5, aspect=30, label="share" if value == "normalised" else "logits")
    return figure


def _published_table(heads: Sequence[PublishedHead]) -> Table:
    """Return the heads that were published for a behaviour of GPT-2 small, with their effects here."""
    visible = [head for head in heads if head.is_found is not None]
    columns = {
        "Role": lambda head: head.role,
        "Head": lambda head: f"{head.layer}.{head.head}",
        "Logits removed": lambda head: number(head.effect),
        "Rank": lambda head: str(head.rank),
        "Found": lambda head: answer(head.is_found, "not seen here"),
    }
    note = (
        f"{sum(bool(head.is_found) for head in visible)} of {len(visible)} known answers were found. Heads of "
        "Wang et al., 2022 (arXiv 2211.00593), for indirect object identification in GPT-2 small. Logits removed: by "
        "noising the head. "
        f"Found: the sign is the published one, and the size among the {len(visible)} largest of all heads. Previous "
        "token heads act before the repeated name, in which prompt and counterpart differ, so they have no effect."
    )
    return Table.of("Published heads", [(head,) for head in heads], columns, frozenset({"Role"}), note=note)


def _carried_table(results: FeaturePatchResults, findings: Findings) -> Table:
    verdicts = results.verdict.dictionaries[TESTED]
    columns = {
        "Behaviour": lambda name, row: findings.title(name),
        "Pairs": lambda name, row: str(row.interchange.prompts if row.interchange else 0),
        "Top features, %": lambda name, row: interval(row.interchange and row.interchange.top, 0, 100),
        "Random lists, %": lambda name, row: percent(row.interchange and row.interchange.random),
        "Whole site, %": lambda name, row: interval(row.interchange and row.interchange.site, 0, 100),
        "Removed": lambda name, row: interval(verdicts[name].ablation["logit_diff"].effect),
        "Restored": lambda name, row: interval(row.restored),
    }
    note = (
        f"Features of {results.dictionary} at {results.site} take the activations that they have in the counterpart. "
        "The three shares are interchange accuracies (Geiger et al., 2021): of the pairs on which the model prefers "
        "the right answer of both prompts, how often its preference becomes the counterpart's; 95 % Wilson intervals. "
        "Random lists: mean over random lists of features that change the site as much. "
        "Whole site: all positions patched together, the most that features at this site can reach; of a crosscoder "
        "all of its sites, but attention sinks. Removed: "
        "fall of the logit difference when the top features take the counterpart's activations. Restored: its rise in "
        "the counterpart when they take the prompt's. Logits, 95 % bootstrap intervals over prompts within templates."
    )
    caption = f"Interchange of {counted(results.k, 'top feature')}"
    return Table.of(caption, results.behaviours.items(), columns, note=note)


def _answers(results: FeaturePatchResults, findings: Findings) -> dict[str, str]:
    """Return the answers of the verdict, for each behaviour; ablation here means taking the counterpart's values."""
    answers = {}
    for name, result in results.verdict.dictionaries[TESTED].items():
        answer = [result.ablation["logit_diff"].sentence, result.random.sentence]
        answer += [fooled_sentence(result.fooled, result.placebo_sets), result.placebo.sentence]
        answers[findings.title(name)] = " ".join(answer).replace("Ablating the", "Patching the")
    return answers
