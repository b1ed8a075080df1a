"""The second half of the report: the features one by one, what was left out, limits, how to run it again."""

from collections.abc import Mapping

import numpy as np

from saejax.causal.ablate.importance import DISCOVERY
from saejax.causal.activation_sources import WORDS
from saejax.reporting import figures
from saejax.reporting.document import Block, Code, Picture, Section, Strips, Terms, Text
from saejax.reporting.findings import Findings
from saejax.reporting.sections import Draw, behaviour, detail_title, place, prompt_count
from saejax.reporting.tables import MISSING, Table, interval, number, percent, significant

_SLOPES = dict(gradient="the gradient", integrated="the integrated gradient", relp="the slope (relevance patching)")
TABLE_ROWS, FIGURE_ROWS = 50, 30  # longest list of features in a table and in a figure


def features(found: Findings, draw: Draw, shown: int) -> list[Section]:
    """The top features of each behaviour, one by one, with the contexts of the first ``shown``."""
    estimate = found.settings()["ablate"]["estimate"]
    intro = (
        f"Features were ranked by attribution: the activation times {_SLOPES[estimate]} of the logit difference, "
        "summed over a prompt and averaged over the train prompts, an estimate of the effect. The drop is measured: "
        "what is lost on the test prompts when this feature alone is removed. Features have numbers and no names. "
        "Below are the contexts of the captured text in which they fire most strongly; colour shows how strongly a "
        "feature fires on a token, and the maximum is bold and underlined. ↵ is a line break, ␣ a space, � a piece of "
        "a character."
    )
    sections = [Section("The features", (Text(intro),))]
    for name, result in found.ablate["behaviours"].items():
        every = [_every(found, name, draw)] if name in found.importance else []
        if result["top"]:
            strips = [_strips(found, name, item) for item in result["top"][:shown]]
            blocks: tuple[Block, ...] = (_singles(name, result, draw), *every, _feature_table(result), *strips)
            sections.append(Section(detail_title(name), blocks, level=3))
        else:
            nothing = Text(
                "No feature was tested: none has an attribution above zero on the train prompts.", strong=True
            )
            sections.append(Section(detail_title(name), (nothing, *every), level=3))
    return sections


def _singles(name: str, result: Mapping, draw: Draw) -> Picture:
    top = result["top"][:FIGURE_ROWS]
    drops = [item["logit_diff_drop"] for item in top]
    numbers = [item["feature"] for item in top]
    figure = figures.single_features(numbers, drops, [item["control_drop"] for item in top])
    above = sum(item["logit_diff_drop"]["low"] > 0 for item in result["top"])
    rest = f" The figure shows the first {len(top)}." if len(top) < len(result["top"]) else ""
    caption = (
        f"In order of attribution. Removed alone, {above} of {len(result['top'])} features cost logit difference with "
        f"an interval above zero; of features without effect about one in forty would.{rest}"
    )
    first = "; ".join(f"feature {item['feature']} {interval(item['logit_diff_drop'])}" for item in top[:5])
    alt = f"{behaviour(name)}: drop of the logit difference when single features are removed. {first}."
    return draw(f"features_{name}", figure, caption, alt)


def _every(found: Findings, name: str, draw: Draw) -> Picture:
    """All features that fire, where each was removed by itself."""
    measured, result = found.importance[name], found.ablate["behaviours"][name]
    said = result["importance"]
    top = [item["feature"] for item in result["top"]]
    strongest = set(measured.feature[np.argsort(-measured.drop, kind="stable")[: len(top)]].tolist())
    used = found.settings()["ablate"]["estimate"]
    fits = [
        f"{name} {fit['pearson']:.2f} (of ranks {fit['spearman']:.2f})"
        for name, fit in said["estimates"].items()
        if fit["pearson"] is not None
    ]
    figure = figures.estimates(getattr(measured, used), measured.drop, measured.q_value <= DISCOVERY, used)
    caption = (
        f"Each of the {said['features']:,} features that fire on the test prompts was removed by itself. "
        f"{said['discoveries']:,} effects are discoveries (sign-flip permutations, q at most {DISCOVERY:g} after "
        f"Benjamini and Hochberg; so few prompts allow no p-value below {said['least_p']:.2g}). Correlation of "
        f"estimates with the effect: {'; '.join(fits) or 'not defined'}. {_agreement(said)}"
        f"Of the {len(top)} features chosen on the train prompts, {len(strongest & set(top))} are among the {len(top)} "
        "with the largest measured effects. Both axes are linear around zero and logarithmic beyond."
    )
    return draw(f"every_feature_{name}", figure, caption, f"{behaviour(name)}: estimate against effect. {caption}")


def _agreement(said: Mapping) -> str:
    """How far importance by correlation, and another half of the prompts, rank the features as their effects do."""
    correlated, stable = said["correlations"]["pearson"], said["stability"]["rank_correlation"]
    return (
        "Correlation of a feature's largest activation with the logit difference, which needs no intervention, ranks "
        f"the features otherwise: its size has a rank correlation of {number(correlated)} with the effect. Effects on "
        f"two halves of the prompts have one of {number(stable)}. "
    )


def _feature_table(result: Mapping) -> Table:
    top = result["top"]
    rows = tuple(
        (
            str(item["feature"]),
            interval(item["logit_diff_drop"]),
            number(item["control_drop"]),
            interval(item["accuracy_drop"], 0, 100),
            significant(item["attribution"]),
            percent(item["firing_rate"], 1),
            significant(item["mean_activation"]),
        )
        for item in top[:TABLE_ROWS]
    )
    columns = (
        "Feature",
        "Logit difference lost",
        "Random",
        "Accuracy lost, points",
        "Attribution",
        "Fires on",
        "Mean activation",
    )
    rest = f" The first {TABLE_ROWS} of {len(top)} features." if len(top) > TABLE_ROWS else ""
    note = (
        "Random: mean loss of logit difference for the random features matched to this one "
        f"({MISSING}: it never fires, so there are none). Fires on: share of the tokens of the test prompts, and of "
        f"those that lend replacements. Square brackets: 95 % bootstrap intervals over prompts.{rest}"
    )
    return Table("Features removed one by one", columns, rows, stack=False, note=note)


def _strips(found: Findings, name: str, item: Mapping) -> Strips:
    feature = item["feature"]
    shared = [
        behaviour(other)
        for other, result in found.ablate["behaviours"].items()
        if other != name and feature in {entry["feature"] for entry in result["top"]}
    ]
    rate, mean = float(found.firing_rate_F[feature]), float(found.mean_activation_F[feature])
    note = f"Removing it alone costs {interval(item['logit_diff_drop'])} logits. "
    note += (
        f"It fires on {significant(100 * rate)} % of held-out tokens, at {significant(mean)} on average."
        if rate > 0
        else "It fires on no held-out token."
    )
    if shared:
        note += f" It is also among the top features of: {', '.join(shared)}."
    examples = tuple(found.examples.get(feature, ()))
    if not examples:
        note += " It fires nowhere in the captured text, so there is no context to show."
    return Strips(f"Feature {feature}", note, examples)


def left_out(found: Findings) -> Section:
    """What the scores do not cover, by which rule, and how much it is."""
    capture = found.settings()["capture"]
    sinks = found.tested["sinks"]
    text = (
        "Attention sinks: on a few tokens, the first of every text above all, the activations are many times longer "
        "than elsewhere. A dictionary trained with them would learn little else. The rule: a position whose norm "
        f"exceeds {number(capture['sink_factor'], 0)} times the median, here {number(sinks['max_norm'], 0)}, is not "
        "trained on, not scored and not edited; it passes through the model untouched. The rule leaves out "
        f"{sinks['position_0']:,} captured tokens at position 0 and {sinks['beyond']:,} beyond it, which is "
        f"{percent(sinks['share_beyond'], 2)} of the tokens beyond position 0. More than "
        f"{percent(capture['max_sink_share'])} would have been an error."
    )
    return Section("What was left out", (Text(text),))


def limits(found: Findings) -> Section:
    """How far the answer reaches."""
    fewest = min(scores["test"]["n"] for scores in found.behaviours.values())
    ratios = "; ".join(
        f"{behaviour(name)} "
        + ", ".join(number(match.get(f"{what}_ratio")) for what in ("firing_rate", "activation", "norm"))
        for name, match in ((name, result["controls"]["match"]) for name, result in found.ablate["behaviours"].items())
    )
    items = [
        (
            "Few prompts",
            f"with {prompt_count(found)} test prompts a behaviour, accuracy moves in steps of "
            f"{number(100 / fewest, 1)} percentage points. Intervals are over prompts of the same form; other wordings "
            "were not tried.",
        ),
        (
            "One place",
            f"only {place(found.ablate['site'])} was tested, with one dictionary ({found.ablate['dictionary']}) from "
            "one training seed. Another seed gives other features.",
        ),
        (
            "Removing is crude",
            f"when a feature is removed, {WORDS[found.ablate['replacement']]}. That can leave the model in a state "
            "that no text leads to, and the rest of the model can make up for it. What the dictionary fails to rebuild "
            "stays in place, so effects through it are not seen.",
        ),
        (
            "Ranking is an estimate",
            f"features were ranked by activation times {_SLOPES[found.settings()['ablate']['estimate']]}, a "
            "first-order estimate; features that matter only together can be missed.",
        ),
        (
            "The control",
            "random features are matched in firing rate, activation and decoder norm, not in direction or attribution. "
            f"Median ratio of control to top feature in each (1 is a perfect match): {ratios}.",
        ),
        (
            "Contexts",
            "the strongest contexts show a feature's peak, not all that it does. They come from the captured text, "
            "which holds the behaviours' train prompts besides the corpus.",
        ),
    ]
    settings = found.settings()
    if not settings["corpus"]["path"] and settings["model"]["path"] == "smollm2":
        easy = (
            "the embedded corpus was sampled from SmolLM2-135M-Instruct, so it is text that this model finds easy: "
            "explained variance and cross-entropy recovered do not compare with those on other corpora."
        )
        items.insert(2, ("Text of its own making", easy))
    weak = [behaviour(name) for name, scores in found.behaviours.items() if scores["flags"]]
    if weak:
        unsure = "the model itself is unsure here, so that effects are hard to see and little follows from them."
        items.insert(0, ("Weak behaviours", f"{', '.join(weak)}: {unsure}"))
    return Section("Limits", (Terms(tuple(items)),))


def reproduce(found: Findings) -> Section:
    """Everything needed to run it again."""
    rows = tuple(
        (
            unit,
            number(summary.get("seconds"), 1),
            _devices(summary.get("devices")),
            ", ".join(f"{group} {_flag(seed)}" for group, seed in (summary.get("seeds") or {}).items()) or MISSING,
            summary.get("start", MISSING).replace("T", " ").replace("+00:00", ""),
        )
        for unit, summary in found.summaries.items()
    )
    columns = ("Stage", "Seconds", "Devices", "Seeds", "Started, UTC")
    stages = Table("The stages that this report reads", columns, rows, frozenset({2, 3, 4}))
    flags = "\n".join(
        f"--{group}.{field}={_flag(value)}"
        for group, fields in found.settings().items()
        for field, value in fields.items()
    )
    packages: dict[str, str] = {}
    for summary in found.summaries.values():
        packages |= summary.get("packages") or {}
    versions = "\n".join(f"{package}=={version}" for package, version in packages.items())
    command = "python -m experiments.pipeline --workdir=runs/again --flagfile=run.flags"
    blocks = (
        Code("With the settings below saved as run.flags", command, folded=False),
        Code("Settings, as a flag file", flags),
        Code("Package versions", versions),
        stages,
    )
    return Section("How to reproduce", blocks)


def _devices(devices: Mapping | None) -> str:
    return f"{devices['count']} × {', '.join(devices['kinds'])}" if devices else MISSING


def _flag(value: object) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
