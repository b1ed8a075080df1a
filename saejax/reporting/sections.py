"""The first half of the report: what was done, the answer, the behaviours.

Every figure in the text comes from ``Findings``; nothing is claimed here that the stages did not find.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from saejax.reporting import figures
from saejax.reporting.document import Block, Picture, Section, Text, Verdict, anchor
from saejax.reporting.findings import Findings
from saejax.reporting.tables import MISSING, Table, interval, number, percent
from saejax.tasks.scoring import SEPARATION_LIMIT

Draw = Callable[[str, Figure, str, str], Picture]  # name, figure, caption, alt

_BEHAVIOURS = {  # title, and what the model is to name
    "agreement": ("Subject-verb agreement", "the verb that agrees with the subject, with another noun in between"),
    "capital": ("Capital of a country", "the capital of a country"),
    "greater_than": ("Greater-than on years", "an end year that lies after the start year"),
    "addition": ("Single-digit addition", "the sum of two digits, after worked examples"),
}
_SITES = {
    "resid_pre": "the residual stream before layer {}",
    "resid_mid": "the residual stream between attention and MLP of layer {}",
    "resid_post": "the residual stream after layer {}",
    "attn_out": "the output of attention in layer {}",
    "mlp_in": "the input of the MLP in layer {}",
    "mlp_out": "the output of the MLP in layer {}",
}
_MODELS = {"smollm2": "SmolLM2-135M-Instruct"}


def behaviour(name: str) -> str:
    """A behaviour's title; an unknown one's name in words."""
    return _BEHAVIOURS[name][0] if name in _BEHAVIOURS else name.replace("_", " ").capitalize()


def place(site: str) -> str:
    """A site in words: "the residual stream after layer 15 (resid_post.15)"."""
    kind, _, layer = site.partition(".")
    return f"{_SITES[kind].format(layer)} ({site})" if kind in _SITES else site


def detail_title(name: str) -> str:
    """The title of the section on a behaviour's features."""
    return f"Features: {behaviour(name)}"


def signed(text: str) -> str:
    """With true minus signs."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def sentence(text: str) -> str:
    """With a capital at the start, a full stop at the end, and true minus signs."""
    text = signed(text.strip())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def prompt_count(found: Findings) -> str:
    """How many test prompts a behaviour has, as "20", or "19 or 20" where they differ."""
    return " or ".join(map(str, sorted({scores["test"]["n"] for scores in found.behaviours.values()})))


def lead(found: Findings) -> tuple[str, ...]:
    """What was done, for a reader who knows transformers: paragraphs."""
    ablate = found.ablate
    wanted = "; ".join(_BEHAVIOURS[name][1] if name in _BEHAVIOURS else behaviour(name) for name in found.behaviours)
    path = found.settings()["model"]["path"]
    model = _MODELS.get(path) or (Path(path).name if path.startswith(("/", ".", "~")) else path)
    return (
        f"The language model {model} was given prompts that ask for: {wanted}. A sparse dictionary, "
        f"trained on the model's activations in {place(ablate['site'])}, writes each of them as a sum of a few out of "
        f"{len(found.firing_rate_F):,} features. A feature is a direction; its activation says how much of it is in "
        "a token.",
        f"For each behaviour the {ablate['top']} features with the largest estimated effect on the answer were chosen "
        f"on one set of prompts and removed together on {prompt_count(found)} others. The same was done with "
        f"{ablate['draws']} draws of as many random features that fire as often and as strongly on those prompts. "
        "Where the first harms the model and the second does not, the features cause part of the behaviour.",
    )


def answer(found: Findings, draw: Draw) -> Section:
    """The verdicts, and what they rest on."""
    results = found.ablate["behaviours"]
    yes = [behaviour(name) for name, result in results.items() if result["verdict"]]
    unbeaten = [behaviour(name) for name, result in results.items() if not result["difference"]["low"] > 0]
    if yes:
        headline = f"Yes for {len(yes)} of {len(results)} behaviours: {', '.join(yes)}."
    else:
        headline = f"No: for none of the {len(results)} behaviours do the top features pass the test."
    if unbeaten:
        headline += f" The top features do not beat the matched random ones on: {', '.join(unbeaten)}."
    else:
        headline += f" The top features cost more than the matched random ones on all {len(results)}."
    chance = [
        behaviour(name)
        for name, result in results.items()
        if result["verdict"] and not result["joint"]["accuracy_drop"]["low"] > 0
    ]
    if chance:
        headline += f" Borderline, because the loss of accuracy alone could be chance: {', '.join(chance)}."
    rule = f"The rule, written in the configuration before any data were seen: {sentence(found.ablate['rule'])}"
    brackets = (
        "Points are percentage points of accuracy on the test prompts. Logit difference is the correct answer's logit "
        "minus the wrong one's. Square brackets: for the top features a 95 % bootstrap interval over prompts, for the "
        "random ones the range of the middle 95 % of the draws."
    )
    verdicts = [_verdict(found, name, result) for name, result in results.items()]
    said = (Text(headline, strong=True), Text(rule))
    blocks: tuple[Block, ...] = (*said, *verdicts, Text(brackets), _joint_picture(found, draw))
    return Section("The answer", blocks)


def _verdict(found: Findings, name: str, result: Mapping) -> Verdict:
    joint, controls, yes = result["joint"], result["controls"], result["verdict"]
    measures = (
        ("Removed together", f"top {joint['n']}", f"random, {controls['draws']} draws"),
        ("Accuracy lost, points", interval(joint["accuracy_drop"], 0, 100), spread(controls["accuracy_drop"], 1, 100)),
        ("Logit difference lost", interval(joint["logit_diff_drop"]), spread(controls["logit_diff_drop"])),
    )
    below = {0.0: "none", 1.0: "every one"}.get(result["percentile"], percent(result["percentile"]))
    compared = f"Together the top features cost more logit difference than {below} of the {controls['draws']} draws."
    if not result["difference"]["low"] > 0:
        compared = f"The top features do not beat the matched random ones. {compared}"
    if yes and not joint["accuracy_drop"]["low"] > 0:
        compared += " The interval of the accuracy lost reaches zero: this loss alone could be chance."
    flags = found.behaviours.get(name, {}).get("flags", ())
    return Verdict(
        name=behaviour(name),
        anchor=anchor(detail_title(name)),
        yes=yes,
        answer="These features cause part of the behaviour." if yes else "Not shown that these features cause it.",
        measures=measures,
        # The reason may start with the verdict, which stands above it already.
        sentences=(sentence(re.sub(r"^(yes|no)\b[:,.]?\s*", "", result["reason"], flags=re.IGNORECASE)), compared),
        flag=sentence("; ".join(flags)) if flags else "",
    )


def spread(draws: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean of the control draws, and the range of the middle 95 % of them."""
    values = np.asarray(draws, float) * scale
    if np.ptp(values) == 0:
        return f"{number(float(values[0]), digits)} in every draw"
    low, high = np.quantile(values, [0.025, 0.975])
    return interval(dict(mean=float(values.mean()), low=float(low), high=float(high)), digits)


def _joint_picture(found: Findings, draw: Draw) -> Picture:
    ablate = found.ablate
    logits, accuracy = (
        {
            behaviour(name): figures.Effect(result["joint"][key], result["controls"][key])
            for name, result in ablate["behaviours"].items()
        }
        for key in ("logit_diff_drop", "accuracy_drop")
    )
    bound = found.settings()["ablate"]["min_accuracy_drop"]
    figure = figures.ablation(logits, accuracy, ablate["top"], ablate["draws"], bound)
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


def behaviours(found: Findings, draw: Draw) -> Section:
    """What the model can do before anything is removed."""
    scores_of = {behaviour(name): scores for name, scores in found.behaviours.items()}
    flagged = [
        f"{name} ({signed('; '.join(scores['flags']))})" for name, scores in scores_of.items() if scores["flags"]
    ]
    weak = "No behaviour was flagged as weak."
    if flagged:
        weak = f"Flagged as weak, to be read with care: {', '.join(flagged)}."
    examples = tuple(
        (example["text"], example["correct"].strip(), example["wrong"].strip(), number(example["logit_diff"]))
        for scores in scores_of.values()
        for example in scores["examples"][:1]
    )
    columns = ("Prompt", "Correct", "Wrong", "Logit difference")
    shown = Table("One prompt of each", columns, examples, frozenset({1, 2}), note="↵ is a line break.")
    splits = {name: {split: scores[split] for split in ("test", "train")} for name, scores in scores_of.items()}
    figure = figures.baselines(splits, found.settings()["task"]["min_accuracy"])
    alt = "Accuracy on test prompts. " + " ".join(
        f"{name}: {interval(scores['test']['accuracy'], 0, 100)} %." for name, scores in scores_of.items()
    )
    caption = "What the model can do with nothing removed. A behaviour that it does not have cannot be explained."
    picture = draw("baselines", figure, caption, alt)
    return Section("The behaviours", (Text(weak, strong=bool(flagged)), shown, picture, _baseline_table(scores_of)))


def _baseline_table(scores_of: Mapping[str, Mapping]) -> Table:
    rows = tuple(
        (
            f"{name}, {split}",
            interval(scores[split]["accuracy"], 0, 100),
            interval(scores[split]["logit_diff"]),
            interval(scores[split]["separation"]).replace(number(SEPARATION_LIMIT), "∞"),
            interval(scores[split]["top1"], 0, 100),
            str(scores[split]["n"]),
        )
        for name, scores in scores_of.items()
        for split in ("test", "train")
    )
    note = (
        "Accuracy: the correct answer's first token has a higher logit than the wrong one's. Logit difference: correct "
        "minus wrong, at the prompt's last token. Separation: its mean over its standard deviation. Top-1: the correct "
        "token has the highest logit of all. Features are chosen on train prompts and judged on test prompts, which in "
        "the built-in behaviours share no content with them. Square brackets: 95 % bootstrap intervals over prompts."
    )
    columns = ("Behaviour", "Accuracy, %", "Logit difference", "Separation", "Top-1, %", "Prompts")
    return Table("The behaviours before anything is removed", columns, rows, stack=False, note=note)


def benchmarks(found: Findings) -> list[Section]:
    """The model's scores on benchmarks; no section if none was asked for."""
    results = found.benchmarks
    if not results:
        return []
    rows = [row for name, figures in results.items() for row in _benchmark_rows(name, figures)]
    note = (
        "Exact match: the strict rule takes the answer from the place where it should stand, the flexible one the last "
        "number or formula of the text. An answer that was not found counts as wrong. Multiple choice: the likeliest "
        "of the given answers; normalised: per character. Square brackets: 95 % bootstrap intervals over items."
    )
    columns = ("Benchmark", "Measure", "Value", "No answer found", "Items")
    return [Section("Benchmarks", (Table("The model on benchmarks", columns, tuple(rows), frozenset({1}), note=note),))]


def _benchmark_rows(name: str, figures: Mapping) -> list[tuple[str, ...]]:
    n = str(figures["n"])
    if figures["score"] == "likelihood":
        nats, share = figures["log_likelihood_per_token"], figures["token_accuracy"]
        return [
            (name, "log-likelihood of the solution, nats per token", interval(nats, 3), MISSING, n),
            (name, "tokens of the solution predicted, %", interval(share, 1, 100), MISSING, n),
        ]
    if figures["score"] == "choice":
        chance = f"chance {percent(figures['chance'])}"
        return [
            (name, f"multiple choice, {rule}, % ({chance})", interval(value, 1, 100), MISSING, n)
            for rule, value in figures["accuracy"].items()
        ]
    return [
        (name, f"exact match, {rule}, %", interval(value, 1, 100), str(figures["unparsed"][rule]), n)
        for rule, value in figures["accuracy"].items()
    ]
