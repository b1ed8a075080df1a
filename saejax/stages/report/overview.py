"""The frame of the report: summary of the run, what the scores leave out, limits, and how to reproduce it."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from saejax.dictionaries.names import kind_and_member
from saejax.evaluation.results import EvaluateResults
from saejax.interventions.answers import AblateResults
from saejax.interventions.edits import WORDS
from saejax.page.blocks import Code, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Findings
from saejax.page.tables import MISSING, Table, number, percent
from saejax.page.words import BEHAVIOURS, behaviour, place
from saejax.results import Settings
from saejax.runner.flags import flag_fields
from saejax.runner.registry import all_groups, flag_of
from saejax.stages.ablate.report import held_out
from saejax.stages.train.report import scores_of
from saejax.tasks.results import BaselineResults

_MODELS = {"smollm2": "SmolLM2-135M-Instruct"}


def prompt_count(findings: Findings) -> str:
    """Return the number of test prompts of a behaviour, as "20", or "19 or 20" where behaviours differ."""
    counts = {scores.test.n for scores in findings.first(BaselineResults).behaviours.values()}
    return " or ".join(map(str, sorted(counts)))


def lead(findings: Findings) -> tuple[str, ...]:
    """Summarize the run for a reader who knows transformers, in one paragraph, so that pictures follow at once."""
    ablate, weak = findings.first(AblateResults), findings.first(BaselineResults).weak
    wanted = "; ".join(
        f"{BEHAVIOURS[name][1] if name in BEHAVIOURS else behaviour(name)}{' (weak)' if name in weak else ''}"
        for name in ablate.top
    )
    path = findings.settings()["model"]["path"]
    model = _MODELS.get(path) or (Path(path).name if path.startswith(("/", ".", "~")) else path)
    features = f"{len(held_out(findings, 'firing_rate')):,} " if findings.select(EvaluateResults) else ""
    several = f"the {ablate.k} with the largest attribution were chosen on train prompts and ablated together"
    chosen = several if ablate.k > 1 else "the one with the largest attribution was chosen on train prompts and ablated"
    return (
        f"{model} was given prompts that ask for: {wanted}. Of the {features}features of the dictionary "
        f"{ablate.dictionary}, which writes {place(ablate.site)} as a sum of a few features, {chosen} on "
        f"{prompt_count(findings)} test prompts.",
    )


def left_out(findings: Findings) -> Section:
    """Return the section on the tokens that scores leave out, with the rule and their number."""
    kind, name = kind_and_member(findings.first(AblateResults).dictionary)
    sinks = next(scores.sinks for scores in scores_of(findings)[kind] if scores.name == name)
    capture = findings.settings()["capture"]
    text = (
        "Attention sinks: on a few tokens, the first of every text above all, the activations are many times longer "
        "than elsewhere. A dictionary trained with them would learn little else. The rule: a position whose norm "
        f"exceeds {number(capture['sink_factor'], 0)} times the median, here {number(sinks.max_norm, 0)}, is not "
        "trained on, not scored and not edited; it passes through the model untouched. The rule leaves out "
        f"{sinks.position_0:,} captured tokens at position 0 and {sinks.beyond:,} beyond it, which is "
        f"{percent(sinks.share_beyond, 2)} of the tokens beyond position 0. More than "
        f"{percent(capture['max_sink_share'])} would have been an error."
    )
    return Section("What was left out", (Text(text),))


def limits(findings: Findings) -> Section:
    """Return the section on the limits of the answer."""
    ablate, behaviours = findings.first(AblateResults), findings.first(BaselineResults).behaviours
    settings = findings.settings()
    fewest = min(scores.test.n for scores in behaviours.values())
    is_several = re.search(r"[,+]", ablate.site)  # SAEs that were tested together, or the parts of a crosscoder
    items = [
        (
            "Few prompts",
            f"with {prompt_count(findings)} test prompts a behaviour, accuracy moves in steps of "
            f"{number(100 / fewest, 1)} percentage points. Intervals are over prompts of the same form; other wordings "
            "were not tried.",
        ),
        (
            "Few sites" if is_several else "One site",
            f"only {place(ablate.site)} {'were' if is_several else 'was'} tested, with {_tested_dictionaries(ablate)}",
        ),
        (
            "Ablation is crude",
            f"when a feature is ablated, {WORDS[ablate.replacement]}. That can leave the model in a state "
            "that no text leads to, and the rest of the model can make up for it. What the dictionary fails to rebuild "
            "stays in place, so effects through it are not seen.",
        ),
        (
            "Ranking is an estimate",
            "features were ranked by activation times gradient, a "
            "first-order estimate; features that matter only together can be missed.",
        ),
        (
            "The controls",
            "random lists hold features that fire on at least 5 % of the test prompts, in random order. Placebo sets "
            "show that the selection depends on the answer, not that the features mean it.",
        ),
        (
            "Contexts",
            "the strongest contexts show a feature's peak, not all that it does. They come from the captured text.",
        ),
    ]
    if not settings["corpus"]["path"] and settings["model"]["path"] == "smollm2":
        easy = (
            "the embedded corpus was sampled from SmolLM2-135M-Instruct, so it is text that this model finds easy: "
            "explained variance and cross-entropy recovered do not compare with those on other corpora."
        )
        items.insert(2, ("Text of its own making", easy))
    weak = [behaviour(name) for name in findings.first(BaselineResults).weak]
    if weak:
        unsure = "the model itself is unsure here, so effects are hard to see and prove little."
        items.insert(0, ("Weak behaviours", f"{', '.join(weak)}: {unsure}"))
    return Section("Limits", (Terms(tuple(items)),))


def reproduce(findings: Findings) -> Section:
    """Return the section with the settings, versions and times that a rerun needs."""
    rows = tuple(
        (
            unit,
            number(summary.seconds, 1),
            f"{summary.devices.count} × {', '.join(summary.devices.kinds)}" if summary.devices else MISSING,
            MISSING if summary.device_hours is None else number(summary.device_hours, 3),
            ", ".join(f"{group} {_flag(seed)}" for group, seed in summary.seeds.items()) or MISSING,
            summary.start.replace("T", " ").replace("+00:00", ""),
        )
        for unit, summary in findings.summaries.items()
    )
    columns = ("Stage", "Seconds", "Devices", "Device-hours", "Seeds", "Started, UTC")
    title = "The stages that this report reads; seconds and device-hours are of all attempts"
    stages = Table(title, columns, rows, frozenset({2, 4, 5}))
    flags = list(dict.fromkeys(_flags(findings.settings())))  # groups share some
    filed = [flag for flag in flags if flag.splitlines() == [flag.rstrip()]]  # a line of a file ends in no space
    typed = [shlex.quote(flag) for flag in flags if flag not in filed]
    packages: dict[str, str] = {}
    for summary in findings.summaries.values():
        packages |= summary.packages
    versions = "\n".join(f"{package}=={version}" for package, version in packages.items())
    command = "python -m experiments.pipeline --workdir=runs/again --flagfile=run.flags"
    blocks = (
        Code("With the settings below saved as run.flags", " ".join([command, *typed]), folded=False),
        Code("Settings, as a flag file", "\n".join(filed)),
        Code("Package versions", versions),
        stages,
    )
    return Section("How to reproduce", blocks)


def _flags(settings: Settings) -> Iterator[str]:
    """Return a line for each setting; the field that holds a group inside a group is not part of the flag's name."""
    names = {flag for group, cls in all_groups().items() for flag in flag_fields(group, cls)}
    for group, fields in settings.items():
        for field, value in fields.items():
            if isinstance(value, Mapping):
                yield from _flags({f"{group}.{name}": inside for name, inside in value.items()})
            elif (flag := flag_of(f"{group}.{field}")) in names:
                yield f"--{flag}={_flag(value)}"


def _flag(value: object) -> str:
    """Return a setting as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _tested_dictionaries(ablate: AblateResults) -> str:
    """Return which dictionaries were tested, in words that end a sentence."""
    seeds = len(ablate.verdict.dictionaries) - 1
    if seeds < 1:
        return f"one dictionary ({ablate.dictionary}) from one training seed. Another seed gives other features."
    others = "one dictionary of another seed" if seeds == 1 else f"{seeds} dictionaries of other seeds"
    return f"{ablate.dictionary} and {others}. Answers in which they differ are about one dictionary, not the model."
