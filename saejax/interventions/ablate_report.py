"""The report on ablation: pictures, a table and a sentence for each question; then each behaviour and its features."""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from saejax.dictionaries import stacks
from saejax.dictionaries.labels import Label, labels_in
from saejax.errors import UserError
from saejax.interventions import ablate_figures
from saejax.interventions.answers import (
    BASIS_NAMES,
    AblateResults,
    BehaviourVerdict,
    CausalAnswer,
    FeatureEffect,
    fooled_sentence,
)
from saejax.interventions.curves import read_curves
from saejax.interventions.table import BASIS, TESTED, UNTRAINED, EffectsTable, load_effects
from saejax.page.blocks import Block, Code, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.strips import Strips
from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.page.words import behaviour, detail_title, sentence, signed
from saejax.runner.preregistration import describe_rule
from saejax.tasks.results import BaselineResults

TABLE_ROWS = 50  # longest list of features


def answer(findings: Findings, draw: Draw) -> Section:
    """Write the opening: a picture for each behaviour, the table of answers, a sentence for each question, the rule."""
    ablate = findings.first(AblateResults)
    tested = ablate.verdict.dictionaries[TESTED]
    blocks: list[Block] = list(_pictures(findings, draw))
    blocks.append(_answer_table(ablate))
    if not any(result.placebo.answer == "yes" for result in tested.values()):
        blocks.append(Text("For no behaviour are the top features shown to be specific to its answer.", strong=True))
    blocks.append(Terms(tuple((title, signed(text)) for title, text in summary_sentences(tested).items())))
    rule = ablate.verdict.rule
    written = f"{describe_rule(findings.report.parent, 'ablate', rule)}."
    blocks.append(Code("The rule in full", "\n".join(textwrap.wrap(written, 96) + [""] + textwrap.wrap(rule, 96))))
    return Section("The answer", tuple(blocks))


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
        if not top:
            nothing = "No feature was tested: none has an attribution above zero on the train prompts."
            sections.append(Section(detail_title(name), (Text(nothing, strong=True),), level=3))
            continue
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


def summary_sentences(
    verdicts: Mapping[str, BehaviourVerdict],
    objective: str = "the logit difference",
    readout: str = "top1",
    accuracy: str = "top-1 accuracy",
) -> dict[str, str]:
    """Return each question with one plain sentence, over all behaviours.

    Args:
      verdicts: the verdict on each behaviour or benchmark.
      objective: the objective in words.
      readout: the readout of accuracy.
      accuracy: accuracy in words.
    """

    def listed(answers: Mapping[str, str]) -> str:
        """Group behaviours by their answer: "yes for A, B; no for C"."""
        groups = dict.fromkeys(answers.values())
        if len(groups) == 1 and len(answers) > 1:
            return f"{next(iter(groups))} for all {len(answers)}"
        return "; ".join(
            f"{group} for {', '.join(behaviour(name) for name, each in answers.items() if each == group)}"
            for group in groups
        )

    def ablation(readout: str) -> str:
        return listed({name: each.ablation[readout].answer for name, each in verdicts.items()})

    fooled = [
        f"{each.fooled} of {each.placebo_sets} ({behaviour(name)})"
        for name, each in verdicts.items()
        if each.fooled is not None and each.placebo_sets
    ]
    passing = (
        f" Of placebo sets, chosen for unrelated tokens, as many pass this: {', '.join(fooled)}." if fooled else ""
    )
    bases = [f"{behaviour(name)}: {_bases_phrase(each)}" for name, each in verdicts.items()]
    return {
        "1. Does ablating the top features have an effect?": (
            f"On {objective}: {ablation(next(iter(next(iter(verdicts.values())).ablation)))}. "
            f"On {accuracy}: {ablation(readout)}."
        ),
        "2. Do they do more than random features at the same dose?": (
            sentence(listed({name: each.random.answer for name, each in verdicts.items()})) + passing
        ),
        "3. Is the effect specific to this answer: larger than that of placebo sets at the same dose?": sentence(
            listed({name: each.placebo.answer for name, each in verdicts.items()})
        ),
        "4. Do they do more than simpler directions at the same dose?": f"{'. '.join(bases)}.",
        "5. Are other behaviours and held-out text spared?": sentence(
            listed({name: each.selective.answer for name, each in verdicts.items()})
        ),
    }


def _bases_phrase(result: BehaviourVerdict) -> str:
    """Return the answers to question 4: "more than MLP neurons; no significant difference from ..."."""
    words = {
        "more": "more than",
        "less": "less than",
        "equivalent": "equivalent to",
        "no significant difference": "no significant difference from",
        "contradictory": "contradictory against",
    }
    phrases = [
        f"{words.get(answer, f'{answer} against')} {', '.join(BASIS_NAMES.get(basis, basis) for basis in bases)}"
        for answer, bases in _bases_by_answer(result).items()
    ]
    return "; ".join(phrases) or "not tested"


def _bases_by_answer(result: BehaviourVerdict) -> dict[str, list[str]]:
    by_answer: dict[str, list[str]] = {}
    for basis, comparison in result.bases.items():
        by_answer.setdefault(comparison.answer, []).append(basis)
    return by_answer


def _pictures(findings: Findings, draw: Draw) -> list[Picture]:
    ablate = findings.first(AblateResults)
    unit = next(unit for unit, summary in findings.summaries.items() if summary.stage == "ablate")
    table = load_effects(findings.folders[unit])
    return [
        dose_picture(name, behaviour(name), table, result, draw)
        for name, result in ablate.verdict.dictionaries[TESTED].items()
    ]


def dose_picture(
    name: str,
    title: str,
    table: EffectsTable,
    result: BehaviourVerdict,
    draw: Draw,
    unit: str = "logit difference lost",
) -> Picture:
    """Return the picture of effects against dose: top features, random and placebo sets, simpler bases.

    Args:
      name: names the figure's file; behind the last underscore of a benchmark's stands its name.
      title: the behaviour or benchmark in words.
      table: the effects table.
      result: the verdict on the behaviour or benchmark.
      draw: draws a figure.
      unit: the effect in words.
    """
    key = name.removeprefix("benchmark_")
    (top,) = read_curves(table, key, "top")
    random, placebo = (read_curves(table, key, group) for group in ("random", "placebo"))
    groups = [edit.group for edit in table.edits if edit.behaviour == key and edit.group.startswith(BASIS)]
    bases = {group.removeprefix(BASIS): read_curves(table, key, group)[0] for group in dict.fromkeys(groups)}
    effect = next(iter(result.ablation.values())).effect
    assert effect is not None
    named = {BASIS_NAMES.get(basis, basis): curve for basis, curve in bases.items()}
    figure = ablate_figures.dose_effect(title, top, effect, random, placebo, named, unit)
    caption = (
        "Every point is a set of as many features, at the smaller of its dose and that of the top features. Points on "
        "the orange line do as much as the top features at the same dose; points below it do less. "
        f"{fooled_sentence(result.fooled, result.placebo_sets)}"
    )
    return draw(f"ablation_{name}", figure, caption, f"{title}. {_described(result)}")


def _described(result: BehaviourVerdict) -> str:
    return signed(f"{next(iter(result.ablation.values())).sentence} {result.random.sentence} {result.placebo.sentence}")


def _answer_table(ablate: AblateResults) -> Table:
    rows = [
        (behaviour(name) + (", untrained dictionary" if dictionary == UNTRAINED else ""), result)
        for dictionary, results in ablate.verdict.dictionaries.items()
        if dictionary in (TESTED, UNTRAINED)
        for name, result in results.items()
    ]
    columns = answer_columns("Behaviour", "1. Effect, logits", ("top1", "Top-1 accuracy, points"))
    if any(result.replication for _, result in rows):
        columns["In other seeds"] = _replication_cell
    note = (
        "Effect: logit difference lost when the top features are ablated, with its 95 % interval. Questions 2 and 3: "
        "mean effect of the control sets and the corrected p-value. An untrained dictionary answers the same questions "
        "as a control."
    )
    caption = f"The five questions, for the {ablate.k} top features of each behaviour"
    return Table.of(caption, rows, columns, words=set(columns), note=note)


def answer_columns(what: str, effect: str, accuracy: tuple[str, str]) -> dict[str, Callable]:
    """Return the columns of the table of answers, as functions of a row's name and verdict.

    Args:
      what: what a row is about.
      effect: title of the effect.
      accuracy: the readout of accuracy, and its title.
    """

    def fooled(_: str, result: BehaviourVerdict) -> str:
        return MISSING if result.fooled is None else f"{result.fooled} of {result.placebo_sets}"

    return {
        what: lambda name, _: name,
        effect: lambda _, result: _effect_cell(next(iter(result.ablation.values()))),
        accuracy[1]: lambda _, result: _effect_cell(result.ablation[accuracy[0]], 0, 100),
        "2. More than random sets": lambda _, result: _set_cell(result.random),
        "Placebo sets that pass 2": fooled,
        "3. Specific": lambda _, result: _set_cell(result.placebo),
        "4. More than bases": lambda _, result: _bases_cell(result),
        "5. Selective": lambda _, result: result.selective.answer,
    }


def _effect_cell(answer: CausalAnswer, digits: int = 2, scale: float = 1) -> str:
    return f"{answer.answer}: {interval(answer.effect, digits, scale)}" if answer.effect else answer.answer


def _set_cell(comparison: CausalAnswer) -> str:
    if comparison.numbers is None:
        return comparison.answer
    figures = comparison.numbers
    if comparison.answer == "not testable":
        return f"not testable ({figures['sets']:.0f} of {figures['needed']:.0f} sets)"
    return f"{comparison.answer} ({figures['sets']:.0f} sets, {number(figures['mean'])}; p {comparison.p_holm:.2g})"


def _bases_cell(result: BehaviourVerdict) -> str:
    listed = [
        f"{answer}: {', '.join(BASIS_NAMES.get(basis, basis) for basis in bases)}"
        for answer, bases in _bases_by_answer(result).items()
    ]
    return "; ".join(listed) or "not tested"


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
    if len(top) > TABLE_ROWS:
        note += f" The table shows the first {TABLE_ROWS}."
    return Table.of(
        "Features ablated one by one", [(item,) for item in top[:TABLE_ROWS]], columns, stack=False, note=note
    )


def held_out(findings: Findings, name: str) -> np.ndarray:
    """Return the "firing_rate" or "mean_activation" of each of the tested dictionary's features on held-out text.

    Raises:
      UserError: the file is missing or damaged.
    """
    kind, member = stacks.kind_and_member(findings.first(AblateResults).dictionary)
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
