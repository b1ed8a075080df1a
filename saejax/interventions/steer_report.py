"""The report on steering: effect against dose, compared with controls, and the rise of cross-entropy on other text."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from saejax.interventions.steer_run import MAX_CE_RISE, BehaviourSteering, SteeringPoint, SteerResults
from saejax.page import style
from saejax.page.blocks import Block, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.page.words import behaviour, place

_METHODS = dict(add="features added", clamp="features clamped", mean_difference="difference of means")
_LOOKS = dict(
    add=(style.ORANGE, "-", "o"), clamp=(style.PINK, ":", "D"), mean_difference=(style.BLUE, "--", "s")
)  # fmt: skip


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return the section on steering; none if it was not asked for."""
    return [_section(results, draw) for results in findings.each(SteerResults).values()]


def _section(results: SteerResults, draw: Draw) -> Section:
    steered = {name: result for name, result in results.behaviours.items() if not result.reason}
    intro = (
        f"Prompts that the model answers correctly are steered to the answer of their counterpart by changing "
        f"{place(results.site)} at every position. Three methods are compared. Features added: the top features of "
        f"{results.dictionary} are raised or lowered by the mean difference of their activations between texts with "
        "either answer. Features clamped: the same features are set to a multiple of their mean activation on texts "
        "with the target answer. Difference of means: the difference between the site's mean values on the two kinds "
        "of text is added. The texts are train prompts and their counterparts. The dose is the root mean square over "
        "prompts of the norm of the change. Controls are random changes of the same dose: random sets of as many "
        "features, or differences of means after the answers were shuffled among the texts."
    )
    blocks: list[Block] = [Text(intro)]
    if steered:
        blocks += [_picture(steered, draw), _table(steered), Terms(tuple(_sentences(steered).items()))]
    if unsteered := [
        (behaviour(name), f"not steered: {result.reason}.")
        for name, result in results.behaviours.items()
        if result.reason
    ]:
        blocks.append(Terms(tuple(unsteered)))
    return Section("Steering", tuple(blocks))


def _picture(steered: Mapping[str, BehaviourSteering], draw: Draw) -> Picture:
    caption = (
        "Drop of the logit difference on test prompts against the dose, with 95 % bootstrap intervals. Large marks: "
        "the strengths chosen on train prompts. Grey lines run from the mean to the largest drop of the controls at "
        "the same dose."
    )
    alt = "Steering. " + " ".join(
        f"{behaviour(name)}: "
        + ", ".join(
            f"{_METHODS[method]} {number(each.points[each.chosen].drop.mean)} logits"
            for method, each in result.methods.items()
        )
        + "."
        for name, result in steered.items()
    )
    return draw("steering", steering({behaviour(name): each for name, each in steered.items()}), caption, alt)


@style.styled
def steering(steered: Mapping[str, BehaviourSteering]) -> Figure:
    """Draw the fall of the logit difference against the dose, a panel for each behaviour.

    Args:
      steered: title -> its results.
    """
    figure, below = style.panels([1.9] * (len(steered) - 1) + [2.3], list(steered))
    for axes, result in zip(below, steered.values(), strict=True):
        for method, each in result.methods.items():
            color, dashes, marker = _LOOKS[method]
            points = sorted((point for point in each.points if point.dose > 0), key=lambda point: point.dose)
            doses, drops = [point.dose for point in points], [point.drop.mean for point in points]
            axes.plot(doses, drops, dashes, color=color, linewidth=1.4)
            for point in points:
                is_chosen = point is each.points[each.chosen]
                _mark(axes, point, color, marker, 7.5 if is_chosen else 4, _METHODS[method])
            chosen = each.points[each.chosen]
            if each.control_max is not None and chosen.dose > 0:
                controls = [each.control_mean, each.control_max]
                axes.plot([chosen.dose] * 2, controls, color=style.GREY, marker="_", label="controls: mean, largest")
        axes.set_xscale("log")
        style.plain_log(axes.xaxis)
        axes.axhline(0, color=style.INK, linewidth=0.7)
        axes.set_ylabel("drop, logits")
        axes.grid(axis="y", color=style.INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("dose: norm of the change at the site")
    style.legend(below[-1], 1)
    return figure


def _mark(axes, point: SteeringPoint, color: str, marker: str, size: float, label: str) -> None:
    lengths_2x1 = style.error_lengths(point.drop)
    axes.errorbar(
        [point.dose], [point.drop.mean], yerr=lengths_2x1, color=color, marker=marker, markersize=size,
        linestyle="none", elinewidth=1, capsize=2, label=label,
    )  # fmt: skip


def _table(steered: Mapping[str, BehaviourSteering]) -> Table:
    rows = []
    for name, result in steered.items():
        for method, each in result.methods.items():
            point = each.points[each.chosen]
            controls = f"{number(each.control_mean)}, {number(each.control_max)} ({each.controls})"
            rows.append(
                (
                    behaviour(name),
                    _METHODS[method],
                    str(result.prompts),
                    number(point.strength),
                    number(point.dose),
                    interval(point.drop),
                    controls if each.controls else MISSING,
                    f"{each.answer.answer}, p = {significant(each.answer.p_holm, 2)}",
                    interval(point.turned, 0, 100),
                    percent(each.control_turned),
                    interval(point.ce_rise),
                )
            )
    columns = (
        "Behaviour", "Changed by", "Prompts", "Strength", "Dose", "Drop", "Controls", "More than controls", "Turned, %",
        "Controls turned", "Text",
    )  # fmt: skip
    note = (
        "The strength of each method is the one that turns most train prompts, among those that raise the "
        f"cross-entropy of held-out text by at most {MAX_CE_RISE:g} nats per token. Drop: of logit(answer) - "
        "logit(target) on test prompts, logits. Controls: mean and largest drop, and their number, at the same dose; p "
        "is the share of controls with at least the method's drop, after Holm's correction over the behaviours. "
        "Turned: share of test prompts whose target has the higher logit, 95 % Wilson interval. Controls turned: the "
        "same share, mean over controls. Text: rise of the cross-entropy of held-out text, nats per token."
    )
    return Table("Steering at the chosen strengths", columns, tuple(rows), frozenset({1, 7}), stack=False, note=note)


def _sentences(steered: Mapping[str, BehaviourSteering]) -> dict[str, str]:
    """Return the answer of each method, for each behaviour."""
    return {
        f"{behaviour(name)}, {_METHODS[method]}": each.answer.sentence
        for name, result in steered.items()
        for method, each in result.methods.items()
    }
