"""The report on causal tests: the graded answers, with what they rest on."""

from saejax.causal.ablate import report_figures
from saejax.causal.ablate.grades import GRADES
from saejax.causal.ablate.report_figures import Effect
from saejax.causal.ablate.report_sets import BASES, YES, named
from saejax.causal.ablate.results import AblateResults, BehaviourAblation, DoseCurve, Grade
from saejax.causal.claims import LEVEL
from saejax.page.blocks import Block, Picture, Text, VerdictBlock
from saejax.page.document import Section, anchor
from saejax.page.findings import Draw, Findings
from saejax.page.tables import interval, percent
from saejax.page.words import behaviour, detail_title, sentence, spread
from saejax.preregistration import said
from saejax.tasks.results import BaselineResults

_BADGES = dict(
    none="Not shown",
    harms="Harms",
    beyond_matched="Beyond matched",
    beyond_bases="Beyond other bases",
    selective="Selective",
)
_ANSWERS = dict(
    none="Not shown that removing these features costs the behaviour.",
    harms="Removing these features costs the behaviour. That it costs more than removing matched random ones was not "
    "shown.",
    beyond_matched="Removing these features costs more than removing matched random ones. That changing the site as "
    "much along another basis costs less was not shown.",
    beyond_bases="Removing these features costs more than removing matched random ones, and more than changing the "
    "site as much along other bases. That it costs this behaviour alone was not shown.",
    selective="Removing these features costs this behaviour, more than other changes of the same dose, and it alone.",
)
_WORDS = dict(
    harms="Harms",
    beyond_matched="Beyond matched features",
    beyond_bases="Beyond other bases at equal dose",
    selective="Selective",
)


def answer(found: Findings, draw: Draw) -> Section:
    """The answers, and what they rest on."""
    ablate = found.one(AblateResults)
    results = ablate.behaviours
    above = [behaviour(name) for name, result in results.items() if result.claim and result.claim.placebo_low > LEVEL]
    opening: list[Block] = []
    if above:
        alarm = f"The rule says yes too often to random features on: {', '.join(above)}. Its answers there mean little."
        opening.append(Text(alarm, alarm=True))
    opening.append(Text(_headline(ablate), strong=True))
    opening.append(Text(f"{said(found.report.parent, 'ablate', ablate.rule)}: {sentence(ablate.rule)}"))
    brackets = (
        "Points are percentage points of accuracy on the test prompts. Logit difference is the correct answer's logit "
        "minus the wrong one's. Square brackets: for the top features a 95 % bootstrap interval over templates and "
        "prompts, for the random ones the range of the middle 95 % of the draws."
    )
    verdicts = [_verdict(found, name, result) for name, result in results.items()]
    return Section("The answer", (*opening, *verdicts, Text(brackets), _joint_picture(found, draw)))


def _headline(ablate: AblateResults) -> str:
    """The highest answers, the highest first, and which simpler bases they are not shown to beat."""
    results = ablate.behaviours
    by_grade: dict[str, list[str]] = {name: [] for name in (*reversed(GRADES), "none")}
    for name, result in results.items():
        by_grade[result.grades.highest].append(behaviour(name))
    sentences = dict(
        selective="The top features cost {} more than other bases at equal dose, and nothing else suffers as much.",
        beyond_bases="The top features cost {} more than other bases at equal dose, but not these alone.",
        beyond_matched="The top features cost {} more than matched random ones; that they do more than a simpler basis "
        "at equal dose is not shown.",
        harms="Removing the top features costs {}; that it costs more than removing matched random ones is not shown.",
        none="Not shown that removing the top features costs {}.",
    )
    parts = [sentences[grade].format(", ".join(names)) for grade, names in by_grade.items() if names]
    simpler = {behaviour(name): _as_well(result) for name, result in results.items()}
    if any(simpler.values()):
        listed = "; ".join(f"{name}: {', '.join(bases)}" for name, bases in simpler.items() if bases)
        parts.append(f"As far as these prompts tell, simpler bases do as well at equal dose: {listed}.")
    again = {behaviour(name): result.holds_again for name, result in results.items() if result.holds_again}
    if again:
        held = ", ".join(name for name, grade in again.items() if grade.holds) or "none"
        parts.append(f"Harm beyond matched features holds again in all trainings tested for: {held}.")
    return " ".join(parts)


def _as_well(result: BehaviourAblation) -> list[str]:
    """The bases that the features are not shown to beat at equal dose."""
    return [
        named(name)
        for name, curve in (result.doses or {}).items()
        if isinstance(curve, DoseCurve)
        and any(at is not None and not at.difference.low > 0 for at in (curve.by_norm, curve.by_kl))
    ]


def _verdict(found: Findings, name: str, result: BehaviourAblation) -> VerdictBlock:
    joint, controls = result.joint, result.controls
    measures = (
        ("Removed together", f"top {joint.n}", f"random, {controls.draws} draws"),
        ("Accuracy lost, points", interval(joint.accuracy_drop, 0, 100), spread(controls.accuracy_drop, 1, 100)),
        ("Logit difference lost", interval(joint.logit_diff_drop), spread(controls.logit_diff_drop)),
    )
    below = {0.0: "none", 1.0: "every one"}.get(result.percentile, percent(result.percentile))
    compared = f"Together the top features cost more logit difference than {below} of the {controls.draws} draws."
    if claim := result.claim:
        compared += (
            f" Put in their place, {percent(claim.placebo_rate, 1)} of the drawn sets pass by the same rule "
            f"({percent(claim.placebo_low, 1)} to {percent(claim.placebo_high, 1)})"
        )
        pool = controls.disjoint_sets
        compared += f"; the pool holds {pool} sets without a feature in common." if pool is not None else "."
    if result.grades.highest != "none" and not joint.accuracy_drop.low > 0:
        compared += " The interval of the accuracy lost reaches zero: this loss alone could be chance."
    grades = [(_WORDS[grade], *_said(getattr(result.grades, grade))) for grade in GRADES]
    if result.holds_again:
        grades.append(("Holds again in other trainings", *_said(result.holds_again)))
    baseline = found.one(BaselineResults).behaviours.get(name)
    flags = baseline.flags if baseline else ()
    return VerdictBlock(
        name=behaviour(name),
        anchor=anchor(detail_title(name)),
        yes=result.grades.highest != "none",
        badge=_BADGES[result.grades.highest],
        answer=_ANSWERS[result.grades.highest],
        grades=tuple(grades),
        measures=measures,
        sentences=(compared,),
        flag=sentence("; ".join(flags)) if flags else "",
    )


def _said(grade: Grade) -> tuple[str, str]:
    reason = grade.reason
    for name, words in BASES.items():
        reason = reason.replace(f" {name}", f" {words}") if "at equal dose" in reason else reason
    return YES[grade.holds], sentence(reason)


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
    draws = max((result.controls.draws for result in results.values()), default=0)
    figure = report_figures.ablation(logits, accuracy, ablate.top, draws, bound)
    alt = "Drop of the logit difference when features are removed together. " + " ".join(
        f"{name}: top features {interval(effect.drop)}, random features {spread(effect.controls)}."
        for name, effect in logits.items()
    )
    caption = (
        "What removing features costs on the test prompts. Orange: the top features, with a 95 % bootstrap interval "
        "over templates and prompts. Grey: each draw of matched random features; the bar is their mean. The further "
        "orange lies to the right of grey, the more the behaviour depends on these features and not on just any."
    )
    return draw("ablation", figure, caption, alt)
