"""The report on causal tests: the answer, with what it rests on."""

import re

from saejax.causal.ablate import report_figures
from saejax.causal.ablate.report_figures import Effect
from saejax.causal.ablate.results import AblateResults, BehaviourAblation
from saejax.causal.claims import LEVEL
from saejax.page.document import Block, Picture, Section, Text, VerdictBlock, anchor
from saejax.page.findings import Draw, Findings
from saejax.page.tables import interval, percent
from saejax.page.words import behaviour, detail_title, sentence, spread
from saejax.rules import said
from saejax.tasks.results import BaselineResults


def answer(found: Findings, draw: Draw) -> Section:
    """The verdicts, and what they rest on."""
    ablate = found.one(AblateResults)
    results = ablate.behaviours
    yes = [behaviour(name) for name, result in results.items() if result.verdict]
    unbeaten = [behaviour(name) for name, result in results.items() if not _beats(result)]
    if yes:
        headline = f"Yes for {len(yes)} of {len(results)} behaviours: {', '.join(yes)}."
    else:
        headline = f"No: for none of the {len(results)} behaviours do the top features pass the test."
    if unbeaten:
        headline += f" The top features do not beat the matched random ones on: {', '.join(unbeaten)}."
    else:
        headline += f" The top features cost more than the matched random ones on all {len(results)}."
    placebo = {name: result.claim for name, result in results.items() if result.claim}
    if above := [behaviour(name) for name, claim in placebo.items() if claim.placebo_low > LEVEL]:
        headline = f"The rule says yes too often to random features on: {', '.join(above)}. {headline}"
    chance = [
        behaviour(name) for name, result in results.items() if result.verdict and not result.joint.accuracy_drop.low > 0
    ]
    if chance:
        headline += f" Borderline, because the loss of accuracy alone could be chance: {', '.join(chance)}."
    rule = f"{said(found.report.parent, 'ablate', ablate.rule)}: {sentence(ablate.rule)}"
    brackets = (
        "Points are percentage points of accuracy on the test prompts. Logit difference is the correct answer's logit "
        "minus the wrong one's. Square brackets: for the top features a 95 % bootstrap interval over prompts, for the "
        "random ones the range of the middle 95 % of the draws."
    )
    verdicts = [_verdict(found, name, result) for name, result in results.items()]
    opening = (Text(headline, strong=True), Text(rule))
    blocks: tuple[Block, ...] = (*opening, *verdicts, Text(brackets), _joint_picture(found, draw))
    return Section("The answer", blocks)


def _beats(result: BehaviourAblation) -> bool:
    """Whether the top features cost more logit difference than all but a few of the matched random sets.

    Results of before there were claims have an interval around the mean of the draws instead, which says yes too often.
    """
    return result.claim.p_logit_diff <= LEVEL if result.claim else result.difference.low > 0


def _verdict(found: Findings, name: str, result: BehaviourAblation) -> VerdictBlock:
    joint, controls, yes = result.joint, result.controls, result.verdict
    measures = (
        ("Removed together", f"top {joint.n}", f"random, {controls.draws} draws"),
        ("Accuracy lost, points", interval(joint.accuracy_drop, 0, 100), spread(controls.accuracy_drop, 1, 100)),
        ("Logit difference lost", interval(joint.logit_diff_drop), spread(controls.logit_diff_drop)),
    )
    below = {0.0: "none", 1.0: "every one"}.get(result.percentile, percent(result.percentile))
    compared = f"Together the top features cost more logit difference than {below} of the {controls.draws} draws."
    if not _beats(result):
        compared = f"The top features do not beat the matched random ones. {compared}"
    if claim := result.claim:
        compared += (
            f" Put in their place, {percent(claim.placebo_rate)} of the matched random sets get a yes by the same rule "
            f"({percent(claim.placebo_low)} to {percent(claim.placebo_high)})."
        )
    if yes and not joint.accuracy_drop.low > 0:
        compared += " The interval of the accuracy lost reaches zero: this loss alone could be chance."
    baseline = found.one(BaselineResults).behaviours.get(name)
    flags = baseline.flags if baseline else ()
    return VerdictBlock(
        name=behaviour(name),
        anchor=anchor(detail_title(name)),
        yes=yes,
        answer="These features cause part of the behaviour." if yes else "Not shown that these features cause it.",
        measures=measures,
        # The reason may start with the verdict, which stands above it already.
        sentences=(sentence(re.sub(r"^(yes|no)\b[:,.]?\s*", "", result.reason, flags=re.IGNORECASE)), compared),
        flag=sentence("; ".join(flags)) if flags else "",
    )


def _joint_picture(found: Findings, draw: Draw) -> Picture:
    ablate = found.one(AblateResults)
    results = {behaviour(name): result for name, result in ablate.behaviours.items()}
    logits = {
        name: Effect(result.joint.logit_diff_drop, result.controls.logit_diff_drop) for name, result in results.items()
    }
    accuracy = {
        name: Effect(result.joint.accuracy_drop, result.controls.accuracy_drop) for name, result in results.items()
    }
    bound = found.settings()["ablate"]["min_accuracy_drop"]
    figure = report_figures.ablation(logits, accuracy, ablate.top, ablate.draws, bound)
    alt = "Drop of the logit difference when features are removed together. " + " ".join(
        f"{name}: top features {interval(effect.drop)}, random features {spread(effect.controls)}."
        for name, effect in logits.items()
    )
    caption = (
        "What removing features costs on the test prompts. Orange: the top features, with a 95 % bootstrap interval "
        "over prompts. Grey: each draw of matched random features; the bar is their mean. The further orange lies to "
        "the right of grey, the more the behaviour depends on these features and not on just any."
    )
    return draw("ablation", figure, caption, alt)
