"""The report on ablation: pictures, a table and a sentence for each question; then each behaviour and its features."""

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saejax.dictionaries.labels import Label
from saejax.dictionaries.names import kind_and_member
from saejax.errors import UserError
from saejax.interventions.answers import (
    ABLATION_READOUTS,
    BASIS_NAMES,
    AblateResults,
    BehaviourVerdict,
    CausalAnswer,
    FeatureEffect,
    fooled_sentence,
)
from saejax.interventions.curves import EffectCurve, compare_at_equal_dose, read_curves
from saejax.interventions.table import BASIS, TESTED, UNTRAINED, EffectsTable, load_effects
from saejax.page import style
from saejax.page.blocks import Block, Code, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.strips import Strips
from saejax.page.style import BLUE, GREY, INK, ORANGE, legend, panels, styled
from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.page.words import behaviour, detail_title, sentence, signed
from saejax.results import Interval
from saejax.runner.labels import labels_in
from saejax.tasks.results import BaselineResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = (  # colours and dashes of bases; those that need no folder have the same ones in all figures
    (style.GREEN, "--"),
    (style.VIOLET, "-."),
    (style.OCHRE, ":"),
    (style.PINK, (0, (8, 2))),
    (INK, (0, (3, 1))),
)


def answer(findings: Findings, draw: Draw) -> Section:
    """Write the opening: a picture for each behaviour, the table of answers, a sentence for each question, the rule."""
    ablate = findings.first(AblateResults)
    tested, untrained = (ablate.verdict.dictionaries.get(name, {}) for name in (TESTED, UNTRAINED))
    unit = next(unit for unit, summary in findings.summaries.items() if summary.stage == "ablate")
    table = load_effects(findings.folders[unit])
    blocks: list[Block] = [
        dose_picture(f"ablation_{name}", behaviour(name), table, name, result, draw) for name, result in tested.items()
    ]
    rows = {behaviour(name): result for name, result in tested.items()}
    rows |= {f"{behaviour(name)}, untrained dictionary": result for name, result in untrained.items()}
    note = (
        "Effect: logit difference lost when the top features are ablated, with its 95 % interval. Questions 2 and 3: "
        "mean effect of the control sets and the corrected p-value. An untrained dictionary answers the same questions "
        "as a control."
    )
    caption = f"The five questions, for the {ablate.k} top features of each behaviour"
    blocks.append(table_of_answers(caption, "Behaviour", rows, note))
    if not any(result.placebo.answer == "yes" for result in tested.values()):
        blocks.append(Text("For no behaviour are the top features shown to be specific to its answer.", strong=True))
    blocks += [summary(tested), rule_in_full(ablate.verdict.rule)]
    return Section("The answer", tuple(blocks))


def rule_in_full(rule: str) -> Code:
    """Return the rule of a verdict, folded away."""
    return Code("The rule in full", "\n".join(textwrap.wrap(rule, 96)))


def details(findings: Findings) -> list[Section]:
    """Write the answers to the five questions for each behaviour, in sentences with their figures."""
    ablate, baseline = findings.first(AblateResults), findings.first(BaselineResults).behaviours
    intro = (
        "Square brackets hold 95 % bootstrap intervals over prompts within templates. p-values are corrected by Holm's "
        "method over the behaviours, within each question. Points are percentage points of accuracy on test prompts."
    )
    sections = [Section("The five questions", (Text(intro),))]
    for name, result in ablate.verdict.dictionaries[TESTED].items():
        flags = baseline[name].flags if name in baseline else ()
        blocks: tuple[Block, ...] = (Terms(_detail_items(result)), _template_table(result))
        if flags:
            blocks = (Text(f"Flagged: {sentence('; '.join(flags))}", alarm=True), *blocks)
        sections.append(Section(f"Answers: {behaviour(name)}", blocks, level=3))
    return sections


def features(findings: Findings, shown: int) -> list[Section]:
    """Describe the top features of each behaviour, with the contexts of the first ``shown``."""
    ablate = findings.first(AblateResults)
    intro = (
        "Features were ranked by attribution: the activation times the gradient of the logit difference, "
        "summed over a prompt and averaged over the train prompts, an estimate of the effect. The drop is measured: "
        "what is lost on the test prompts when this feature alone is ablated. Features have numbers, and names only "
        "where they were interpreted. "
        "Below are the contexts of the captured text in which they fire most strongly; colour shows how strongly a "
        "feature fires on a token, and the maximum is bold and underlined. ↵ is a line break, ␣ a space, � a piece of "
        "a character."
    )
    sections = [Section("The features", (Text(intro),))]
    labels = labels_in(findings.folders, ablate.dictionary)
    make_strips = _make_strips(findings, labels) if shown and findings.examples else None
    for name, top in ablate.top.items():
        strips = [make_strips(name, item) for item in top[:shown]] if make_strips else []
        blocks: list[Block] = [_feature_table(top, labels), *strips]
        importance = (ablate.importance or {}).get(name)
        if importance:
            text = (
                f"Of all {importance.features:,} live features, each ablated alone, {importance.significant:,} have a "
                "significant effect (family-wise p at most 0.05). The rank correlation of attribution with the effect "
                f"is {number(importance.attribution_correlation)}, that of the correlation of activation and logit "
                f"difference {number(importance.activation_correlation)}."
            )
            blocks.insert(1, Text(text))
        sections.append(Section(detail_title(name), tuple(blocks), level=3))
    return sections


def summary(verdicts: Mapping[str, BehaviourVerdict]) -> Terms:
    """Answer each question in one plain sentence, over all behaviours or benchmarks."""

    def listed(answer_of: Callable[[BehaviourVerdict], CausalAnswer]) -> str:
        """Group behaviours by their answer: "yes for A, B; no for C"."""
        answers = {behaviour(name): answer_of(result).answer for name, result in verdicts.items()}
        groups = dict.fromkeys(answers.values())
        if len(groups) == 1 and len(answers) > 1:
            return f"{next(iter(groups))} for all {len(answers)}"
        return "; ".join(
            f"{group} for {', '.join(name for name, each in answers.items() if each == group)}" for group in groups
        )

    fooled = [
        f"{each.fooled} of {each.placebo_sets} ({behaviour(name)})"
        for name, each in verdicts.items()
        if each.fooled is not None and each.placebo_sets
    ]
    passing = f" Of placebo sets, chosen for unrelated tokens, as many pass this: {', '.join(fooled)}."
    objective, accuracy = _main_readouts(next(iter(verdicts.values())))
    effects = {
        objective: listed(lambda result: result.ablation[objective]),
        accuracy: listed(lambda result: result.ablation[accuracy]),
    }
    bases = [f"{behaviour(name)}: {_bases_phrase(each)}." for name, each in verdicts.items()]
    sentences = {
        "1. Does ablating the top features have an effect?": " ".join(
            f"On {ABLATION_READOUTS[readout][0]}: {answers}." for readout, answers in effects.items()
        ),
        "2. Do they do more than random features at the same dose?": (
            sentence(listed(lambda result: result.random)) + (passing if fooled else "")
        ),
        "3. Is the effect specific to this answer: larger than that of placebo sets at the same dose?": sentence(
            listed(lambda result: result.placebo)
        ),
        "4. Do they do more than simpler directions at the same dose?": " ".join(bases),
        "5. Are other behaviours and held-out text spared?": sentence(listed(lambda result: result.selective)),
    }
    return Terms(tuple((title, signed(text)) for title, text in sentences.items()))


def _main_readouts(result: BehaviourVerdict) -> tuple[str, str]:
    """Return the objective, and the readout of accuracy."""
    return next(iter(result.ablation)), "top1" if "top1" in result.ablation else "accuracy"


def _bases_phrase(result: BehaviourVerdict) -> str:
    """Return the answers to question 4: "more than MLP neurons; no significant difference from ..."."""
    words = {
        "more": "more than",
        "less": "less than",
        "equivalent": "equivalent to",
        "no significant difference": "no significant difference from",
        "contradictory": "contradictory against",
        "not testable": "not testable against",
    }
    by_answer: dict[str, list[str]] = {}
    for basis, comparison in result.bases.items():
        by_answer.setdefault(comparison.answer, []).append(BASIS_NAMES.get(basis, basis))
    return "; ".join(f"{words[answer]} {', '.join(bases)}" for answer, bases in by_answer.items()) or "not tested"


def dose_picture(
    name: str, title: str, table: EffectsTable, tested: str, result: BehaviourVerdict, draw: Draw
) -> Picture:
    """Return the picture of effects against dose: top features, random and placebo sets, simpler bases.

    Args:
      name: names the figure's file.
      title: the behaviour or benchmark in words.
      table: the effects table.
      tested: the behaviour or benchmark in the table.
      result: the verdict on it.
      draw: draws a figure.
    """
    (top,) = read_curves(table, tested, "top")
    random, placebo = (read_curves(table, tested, group) for group in ("random", "placebo"))
    groups = [edit.group for edit in table.edits if edit.behaviour == tested and edit.group.startswith(BASIS)]
    bases = {group.removeprefix(BASIS): read_curves(table, tested, group)[0] for group in dict.fromkeys(groups)}
    named = {BASIS_NAMES.get(basis, basis): curve for basis, curve in bases.items()}
    objective, ablation = next(iter(result.ablation.items()))
    assert ablation.effect is not None
    unit = f"{ABLATION_READOUTS[objective][0].removeprefix('the ')} lost"
    caption = (
        "Every point is a set of as many features, at the smaller of its dose and that of the top features. Points on "
        "the orange line do as much as the top features at the same dose; points below it do less. "
        f"{fooled_sentence(result.fooled, result.placebo_sets)}"
    )
    alt = signed(f"{title}. {ablation.sentence} {result.random.sentence} {result.placebo.sentence}")
    return draw(name, dose_effect(title, top, ablation.effect, random, placebo, named, unit), caption, alt)


@styled
def dose_effect(
    title: str,
    top: EffectCurve,
    effect: Interval,
    random: Sequence[EffectCurve],
    placebo: Sequence[EffectCurve],
    bases: Mapping[str, EffectCurve],
    unit: str = "logit difference lost",
) -> "Figure":
    """Draw the effects of the top features, random sets, placebo sets and other bases against their doses.

    Args:
      title: the behaviour.
      top: the top features.
      effect: their effect at full dose.
      random: the random sets; each is a point at the smaller of its dose and that of the top features.
      placebo: the placebo sets, likewise.
      bases: the other bases by name, each drawn up to the dose of the top features.
      unit: the effect in words.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = panels((4.1,), (title,))
    k = len(top.edits[-1].features)
    label = f"the {k} top features, ablated by growing fractions"
    axes.plot(top.dose_A, top.drop_AxP.mean(axis=1), "-D", color=ORANGE, markersize=4.5, zorder=4, label=label)
    axes.errorbar(
        [top.dose_A[-1]], [effect.mean], yerr=style.error_lengths(effect), color=ORANGE, capsize=3, elinewidth=1.8
    )
    for curves, color, marker, name in (
        (random, GREY, "o", "random sets"),
        (placebo, BLUE, "x", "placebo sets: top features for unrelated tokens"),
    ):
        if curves:
            _, drop_NxP, dose_N = compare_at_equal_dose(top, curves)
            drop_N, label = drop_NxP.mean(axis=1), f"{len(curves)} {name}"
            axes.plot(dose_N, drop_N, marker, color=color, markersize=4.2, alpha=0.75, zorder=2, label=label)
    # A folder's basis comes after those that any figure may have.
    order = dict.fromkeys([*BASIS_NAMES.values(), *bases])
    styles = dict(zip(order, itertools.cycle(_STYLES), strict=False))
    for name, curve in bases.items():
        color, dashes = styles[name]
        # Up to the dose of the top features: nothing is compared beyond it.
        dose_M = np.append(curve.dose_A[curve.dose_A < top.reach], min(curve.reach, top.reach))
        drop_M = curve.drop_at(dose_M).mean(axis=1)
        axes.plot(dose_M, drop_M, linestyle=dashes, color=color, linewidth=1.6, zorder=3, label=name)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="dose: norm of the change at the site", ylabel=unit)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    legend(axes, 1)
    return figure


def table_of_answers(caption: str, what: str, verdicts: Mapping[str, BehaviourVerdict], note: str) -> Table:
    """Return the table of the answers to all questions.

    Args:
      caption: what it shows.
      what: what a row is about.
      verdicts: title of a row -> its verdict.
      note: a line below it.
    """
    objective, accuracy = _main_readouts(next(iter(verdicts.values())))
    accuracy_name = ABLATION_READOUTS[accuracy][0]

    def fooled(_: str, result: BehaviourVerdict) -> str:
        return MISSING if result.fooled is None else f"{result.fooled} of {result.placebo_sets}"

    columns: dict[str, Callable[[str, BehaviourVerdict], str]] = {
        what: lambda title, _: title,
        f"1. Effect, {ABLATION_READOUTS[objective][2]}": lambda _, result: _effect_cell(result.ablation[objective]),
        f"{accuracy_name[:1].upper()}{accuracy_name[1:]}, points": lambda _, result: _effect_cell(
            result.ablation[accuracy], 0, 100
        ),
        "2. More than random sets": lambda _, result: _set_cell(result.random),
        "Placebo sets that pass 2": fooled,
        "3. Specific": lambda _, result: _set_cell(result.placebo),
        "4. More than bases": lambda _, result: _bases_phrase(result),
        "5. Selective": lambda _, result: result.selective.answer,
    }
    if any(result.replication for result in verdicts.values()):
        columns["In other seeds"] = _replication_cell
    return Table.of(caption, verdicts.items(), columns, words=set(columns), note=note)


def _effect_cell(answer: CausalAnswer, digits: int = 2, scale: float = 1) -> str:
    return f"{answer.answer}: {interval(answer.effect, digits, scale)}" if answer.effect else answer.answer


def _set_cell(comparison: CausalAnswer) -> str:
    if comparison.numbers is None:
        return comparison.answer
    figures = comparison.numbers
    if comparison.answer == "not testable":
        return f"not testable ({figures['sets']:.0f} of {figures['needed']:.0f} sets)"
    return f"{comparison.answer} ({figures['sets']:.0f} sets, {number(figures['mean'])}; p {comparison.p_holm:.2g})"


def _replication_cell(_: str, result: BehaviourVerdict) -> str:
    if result.replication is None or result.replication.numbers is None:
        return MISSING
    counts = result.replication.numbers
    questions = {"1.": "ablation", "2.": "random", "3.": "placebo"}
    return "; ".join(f"{of} {counts[key]:.0f} of {counts['dictionaries']:.0f}" for of, key in questions.items())


def _detail_items(result: BehaviourVerdict) -> tuple[tuple[str, str], ...]:
    ablation = " ".join(each.sentence for each in result.ablation.values())
    bases = " ".join(comparison.sentence for comparison in result.bases.values()) or "Not tested."
    items = [
        ("1. Effect", ablation),
        (
            "2. More than random sets",
            f"{result.random.sentence} {fooled_sentence(result.fooled, result.placebo_sets)}",
        ),
        ("3. Specific to this answer", result.placebo.sentence),
        ("4. More than simpler bases", bases),
        ("5. Selective", result.selective.sentence),
    ]
    if result.replication:
        items.append(("Replication", result.replication.sentence))
    return tuple((title, signed(text)) for title, text in items)


def _template_table(result: BehaviourVerdict) -> Table:
    columns = {
        "Template": lambda name, _: name or MISSING,
        "Logit difference lost": lambda _, drop: number(drop),
        "Held out": lambda name, _: "yes" if name in result.held_out else "no",
    }
    note = "Held out: no train prompt has this template."
    return Table.of("The effect by template", result.templates.items(), columns, stack=False, note=note)


def _feature_table(top: tuple[FeatureEffect, ...], labels: Mapping[int, Label]) -> Table:
    columns = {
        "Feature": lambda item: (
            f"{item.feature} {labels[item.feature].label if item.feature in labels else ''}".strip()
        ),
        "Logit difference lost": lambda item: interval(item.drop),
        "Attribution": lambda item: significant(item.attribution),
        "Fires on": lambda item: percent(item.firing_rate, 1),
        "Mean activation": lambda item: significant(item.mean_activation),
    }
    above = sum(item.drop.low > 0 for item in top)
    note = (
        f"In order of attribution. Ablated alone, {above} of {len(top)} features lower the logit difference with an "
        "interval above zero; of features without effect about one in forty would. Fires on: share of the tokens of "
        "the test prompts."
    )
    return Table.of("Features ablated one by one", [(item,) for item in top], columns, stack=False, note=note)


def held_out(findings: Findings, name: str) -> np.ndarray:
    """Return the "firing_rate" or "mean_activation" of each of the tested dictionary's features on held-out text.

    Raises:
      UserError: the file is missing or damaged.
    """
    kind, member = kind_and_member(findings.first(AblateResults).dictionary)
    path: Path = findings.folders[f"evaluate/{kind}"] / member / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"{path} is missing or damaged: delete {path.parent} and run the evaluate stage again"
        ) from None


def _make_strips(findings: Findings, labels: Mapping[int, Label]) -> Callable[[str, FeatureEffect], Strips]:
    """Return the function that shows the contexts of a behaviour's top feature, with a note."""
    rate_F, mean_F = (held_out(findings, name) for name in ("firing_rate", "mean_activation"))
    tops = {name: {item.feature for item in top} for name, top in findings.first(AblateResults).top.items()}

    def strips(name: str, item: FeatureEffect) -> Strips:
        feature, label = item.feature, labels.get(item.feature)
        shared = [behaviour(key) for key, top in tops.items() if key != name and feature in top]
        rate, mean = float(rate_F[feature]), float(mean_F[feature])
        note = f"Called {label.label} by {label.by}. " if label else ""
        note += f"Ablating it alone lowers the logit difference by {interval(item.drop)}. "
        note += (
            f"It fires on {significant(100 * rate)} % of held-out tokens, at {significant(mean)} on average."
            if rate > 0
            else "It fires on no held-out token."
        )
        if shared:
            note += f" It is also among the top features of: {', '.join(shared)}."
        examples = tuple(findings.examples.get(feature, ()))
        if not examples:
            note += " It fires nowhere in the captured text, so there is no context to show."
        return Strips(f"Feature {feature}", note, examples)

    return strips
