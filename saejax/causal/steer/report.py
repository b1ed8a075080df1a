"""The report on steering: how many answers turn at which dose, and what it costs."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from saejax.causal.steer.results import BehaviourSteering, SteeringPoint, SteerResults
from saejax.page import style
from saejax.page.blocks import Block, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent, significant, visible
from saejax.page.words import behaviour, place

_METHODS = {
    "features": "features added",
    "clamp": "features clamped",
    "difference": "difference of means",
    "gradient": "mean gradient",
}
_LOOKS = {
    "features": (style.ORANGE, "-", "o"),
    "clamp": (style.PINK, ":", "D"),
    "difference": (style.BLUE, "--", "s"),
    "gradient": (style.VIOLET, "-.", "v"),
}


def sections(found: Findings, draw: Draw) -> list[Section]:
    """What steering does; no section if it was not asked for."""
    return [_section(results, found, draw) for results in found.each(SteerResults).values()]


def _section(results: SteerResults, found: Findings, draw: Draw) -> Section:
    steered = {name: result for name, result in results.behaviours.items() if not result.reason}
    settings = found.settings()["steer"]
    where = "at every position" if results.positions == "all" else "at the last position"
    intro = (
        f"Prompts that the model answers rightly are turned to the answer of their counterparts by a change of "
        f"{place(results.site)}, {where}. What is changed was learned on train prompts and their counterparts: the "
        "difference between the mean values of texts with either answer, or between their mean gradients of the logit "
        f"difference; that of the top {settings['top']} features of {results.dictionary}, ranked by change times "
        "gradient; or these features clamped at a multiple of their mean on texts of the target. A dose is the length "
        "of the change in mean lengths of the values there. Random directions are differences of means after the "
        "answers were shuffled among the texts."
    )
    blocks: list[Block] = [Text(intro)]
    if steered:
        blocks += [_picture(steered, draw), _table(steered), Terms(tuple(_beside(steered)))]
    if without := [
        (behaviour(name), f"not steered: {r.reason}.") for name, r in results.behaviours.items() if r.reason
    ]:
        blocks.append(Terms(tuple(without)))
    return Section("Steering", tuple(blocks))


def _picture(steered: Mapping[str, BehaviourSteering], draw: Draw) -> Picture:
    caption = (
        "Share of the test prompts whose target has the higher logit, against the dose, with 95 % Wilson intervals. "
        "Grey: random directions, mean and middle 95 % of the draws. Green: examples of the target in front of the "
        "prompt, at the length of what they change at the last position; hollow, the same examples with their right "
        "answers. Large marks: the strengths that were chosen on train prompts."
    )
    alt = "Answers turned by steering. " + " ".join(
        f"{behaviour(name)}: "
        + ", ".join(
            f"{_METHODS[kind]} {percent(one.points[one.chosen].flipped.mean)} at dose "
            f"{number(one.points[one.chosen].dose)}"
            for kind, one in result.methods.items()
        )
        + "."
        for name, result in steered.items()
    )
    return draw("steering", steering({behaviour(name): one for name, one in steered.items()}), caption, alt)


@style.styled
def steering(steered: Mapping[str, BehaviourSteering]) -> Figure:
    """Share of answers that turn, against the dose, a panel for each behaviour.

    Args:
      steered: title -> its results.
    """
    figure, below = style.panels([1.9] * (len(steered) - 1) + [2.3], list(steered))
    for axes, result in zip(below, steered.values(), strict=True):
        doses = [one.dose for one in result.random]
        low, high = ([100 * getattr(one.flipped, end) for one in result.random] for end in ("low", "high"))
        axes.fill_between(doses, low, high, color=style.GREY, alpha=0.25, linewidth=0, label="random directions")
        axes.plot(doses, [100 * one.flipped.mean for one in result.random], color=style.GREY, linewidth=1)
        for name, method in result.methods.items():
            color, dashes, marker = _LOOKS[name]
            axes.plot(*_of(method.points), dashes, color=color, linewidth=1.4)
            for number_, point in enumerate(method.points):
                size = 7.5 if number_ == method.chosen else 4
                _mark(axes, point, color, marker, size, _METHODS[name])
        if result.prompting:
            _mark(axes, result.prompting.target, style.GREEN, "^", 7.5, "examples of the target")
            _mark(axes, result.prompting.correct, style.GREEN, "^", 7.5, "examples with right answers", hollow=True)
        axes.set_xscale("log")
        style.plain_log(axes.xaxis)
        axes.set(ylim=(-7, 107), yticks=(0, 50, 100), ylabel="%")
        axes.grid(axis="y", color=style.INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("dose: length of the change, in mean lengths of the values")
    style.legend(below[-1], 1)
    return figure


def _of(points: tuple[SteeringPoint, ...]) -> tuple[list[float], list[float]]:
    pairs = sorted((point.dose, 100 * point.flipped.mean) for point in points)
    return [dose for dose, _ in pairs], [share for _, share in pairs]


def _mark(axes, point: SteeringPoint, color: str, marker: str, size: float, label: str, hollow: bool = False) -> None:
    lengths_2x1 = style.error_lengths(point.flipped, 100)
    axes.errorbar(
        [point.dose], [100 * point.flipped.mean], yerr=lengths_2x1, color=color, marker=marker,
        markersize=size, markerfacecolor="none" if hollow else color, linestyle="none", elinewidth=1, capsize=2,
        label=label,
    )  # fmt: skip


def _table(steered: Mapping[str, BehaviourSteering]) -> Table:
    rows = []
    for name, result in steered.items():
        for kind, method in result.methods.items():
            point, claim = method.points[method.chosen], method.claim
            assert claim
            beats = f"{'yes' if claim.yes else 'no'}, p = {significant(claim.p_holm, 2)}"
            beside = interval(method.random.flipped, 0, 100)
            rows.append(_row(behaviour(name), _METHODS[kind], point, beside, beats, method.continuation_ce))
        if result.prompting:
            for label, point in (
                ("examples of the target", result.prompting.target),
                ("examples with right answers", result.prompting.correct),
            ):
                rows.append(_row(behaviour(name), label, point, MISSING, MISSING, None))
        rows.append((behaviour(name), "nothing", *[MISSING] * 6, number(result.clean_ce)))
    columns = (
        "Behaviour", "Changed by", "Dose", "Turned, %", "Random, %", "Beyond random", "Logits", "Text", "Own text",
    )  # fmt: skip
    draws = [method.random.draws for result in steered.values() for method in result.methods.values()]
    rates = [m.claim.placebo_rate for result in steered.values() for m in result.methods.values() if m.claim]
    note = (
        "The strength of each method is the one that turns most train prompts of those that cost little text. Turned: "
        "share of test prompts whose target has the higher logit, with its 95 % Wilson interval; random: mean over "
        f"{min(draws)} draws or more at that dose, and the middle 95 % of them. Beyond random: more logits and "
        "more answers turned than by random directions, p after Holm's correction over all methods and behaviours; "
        f"random directions themselves pass in {percent(max(rates), 1)} of draws at most. Logits: fall of logit(own "
        "answer) − logit(target). Text: rise of cross-entropy on held-out text, per token. Own text: cross-entropy "
        "under the clean model of what the steered one goes on with."
    )
    return Table("Steering at the chosen strengths", columns, tuple(rows), frozenset({1, 5}), stack=False, note=note)


def _row(
    name: str, kind: str, point: SteeringPoint, random: str, beats: str, continuation: float | None
) -> tuple[str, ...]:
    turned, costs = interval(point.flipped, 0, 100), (interval(point.drop, 1), interval(point.ce_rise))
    return name, kind, number(point.dose), turned, random, beats, *costs, number(continuation)


def _beside(steered: Mapping[str, BehaviourSteering]) -> list[tuple[str, str]]:
    """Features and differences of means at equal dose, and who was left out."""
    lines = []
    for name, result in steered.items():
        said = [f"{result.prompts} test prompts"]
        said += [f"left out for {why}: {count}" for why, count in result.left_out.items() if count]
        for kind, doses in result.equal_dose.items():
            for dose, equal in doses.items():
                by = "length" if dose == "norm" else "divergence on held-out text"
                said.append(f"features added less {_METHODS[kind]} at equal {by}: {interval(equal.difference)} logits")
        said += [
            f"{_METHODS[kind]}, the model goes on: {visible(method.continuation)!r}"
            for kind, method in result.methods.items()
        ]
        lines.append((behaviour(name), "; ".join(said) + "."))
    return lines
