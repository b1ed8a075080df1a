"""The report on steering: effect against dose, compared with controls, and the rise of cross-entropy on other text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from saejax.interventions.steering import MAX_CE_RISE, BehaviourSteering, SteerResults
from saejax.page import style
from saejax.page.blocks import Block, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import number
from saejax.page.words import WEAK, behaviour, place, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHODS = dict(add="features added", clamp="features clamped", mean_difference="difference of means")
_LOOKS = dict(
    add=(style.ORANGE, "-", "o"), clamp=(style.PINK, ":", "D"), mean_difference=(style.BLUE, "--", "s")
)  # fmt: skip
_CAPTION = (
    "Drop of the logit difference on test prompts against the dose, with 95 % bootstrap intervals. Large marks: the "
    "strengths chosen on train prompts. Grey lines run from the mean to the largest drop of the controls at the same "
    "dose."
)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return the section on steering; none if it was not asked for."""
    return [_section(results, findings, draw) for results in findings.select(SteerResults).values()]


def _section(results: SteerResults, findings: Findings, draw: Draw) -> Section:
    steered = {findings.title(name): result for name, result in results.behaviours.items() if not result.reason}
    intro = (
        f"Prompts that the model answers correctly are steered to the answer of their counterpart by changing "
        f"{place(results.site)} at every position. Three methods are compared. Features added: the top features of "
        f"{results.dictionary} are raised or lowered by the mean difference of their activations between texts with "
        "either answer. Features clamped: the same features are set to a multiple of their mean activation on texts "
        "with the target answer. Difference of means: the difference between the site's mean values on the two kinds "
        "of text is added. The texts are train prompts and their counterparts. The dose is the root mean square over "
        "prompts of the norm of the change. Controls are random changes of the same dose: random lists of features, "
        "each raised by as large a multiple of its mean activation, or differences of means after the answers were "
        "shuffled among the texts. Each method's strength is the one that turns most train prompts, among those that "
        f"raise the cross-entropy of held-out text by at most {MAX_CE_RISE:g} nats per token; test prompts judge it. A "
        "prompt is turned if its target has the higher logit. p is the share of the method and its controls with "
        "at least its drop of the logit difference."
    )
    blocks: list[Block] = [Text(intro)]
    if steered:
        drops = {
            title: ", ".join(
                f"{_METHODS[method]} {number(curve.points[curve.chosen].drop.mean)} logits"
                for method, curve in result.methods.items()
            )
            for title, result in steered.items()
        }
        alt = "Steering. " + " ".join(f"{title}: {listed}." for title, listed in drops.items())
        answers = {
            f"{title}, {_METHODS[method]}": signed(curve.answer.sentence)
            for title, result in steered.items()
            for method, curve in result.methods.items()
        }
        blocks += [draw("steering", steering(steered), _CAPTION, alt), Terms(tuple(answers.items()))]
    if findings.weak(name for name, result in results.behaviours.items() if not result.reason):
        blocks.append(Text(WEAK))
    reasons = {behaviour(name): result.reason for name, result in results.behaviours.items() if result.reason}
    if reasons:
        blocks.append(Terms(tuple((title, f"not steered: {reason}.") for title, reason in reasons.items())))
    return Section("Steering", tuple(blocks))


@style.styled
def steering(steered: Mapping[str, BehaviourSteering]) -> "Figure":
    """Draw the fall of the logit difference against the dose, a panel for each behaviour.

    Args:
      steered: title -> its results.
    """
    figure, below = style.panels([1.9] * (len(steered) - 1) + [2.3], list(steered))
    for axes, result in zip(below, steered.values(), strict=True):
        for method, curve in result.methods.items():
            color, dashes, marker = _LOOKS[method]
            points = sorted((point for point in curve.points if point.dose > 0), key=lambda point: point.dose)
            doses, drops = [point.dose for point in points], [point.drop.mean for point in points]
            axes.plot(doses, drops, dashes, color=color, linewidth=1.4)
            chosen = curve.points[curve.chosen]
            for point in points:
                axes.errorbar(
                    [point.dose], [point.drop.mean], yerr=style.error_lengths(point.drop), color=color, marker=marker,
                    markersize=7.5 if point is chosen else 4, linestyle="none", elinewidth=1, capsize=2,
                    label=_METHODS[method],
                )  # fmt: skip
            if curve.controls and chosen.dose > 0:
                controls = [np.mean(curve.controls), max(curve.controls)]
                axes.plot([chosen.dose] * 2, controls, color=style.GREY, marker="_", label="controls: mean, largest")
        axes.set_xscale("log")
        style.plain_log(axes.xaxis)
        axes.axhline(0, color=style.INK, linewidth=0.7)
        axes.set_ylabel("drop, logits")
        axes.grid(axis="y", color=style.INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("dose: norm of the change at the site")
    style.legend(below[-1], 1)
    return figure
