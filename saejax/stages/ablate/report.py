"""The report on ablation: a sentence and a picture a behaviour, the table; then each behaviour and its features."""

import textwrap
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saejax.dictionaries.labels import Label
from saejax.dictionaries.names import kind_and_member
from saejax.errors import UserError
from saejax.interventions.answers import (
    ABLATION_READOUTS,
    BASIS_NAMES,
    CONTROLS,
    AblateResults,
    BehaviourVerdict,
    CausalAnswer,
    FeatureEffect,
    Kept,
    enough_sentence,
    fooled_sentence,
    over_controls,
)
from saejax.interventions.table import BASIS, TESTED, EditDefinition, EffectsTable, load_effects
from saejax.page import style
from saejax.page.blocks import Block, Code, Picture, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.strips import Strips
from saejax.page.style import BLUE, GREY, INK, ORANGE, legend, panels, styled
from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.page.words import WEAK, behaviour, mark_weak, sentence, signed, warn_weak
from saejax.results import Interval
from saejax.runner.labels import labels_in
from saejax.tasks.results import BaselineResults
from saejax.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4  # top features of a behaviour that have a card: a screen holds them
_MARKERS = "s^vPX*"
_STRIPS = dict(random="random lists", placebo="placebo sets", untrained="untrained")
_COLOURS = dict(random=GREY, placebo=BLUE, untrained=style.VIOLET, bases=style.GREEN)


def answer(findings: Findings, draw: Draw) -> Section:
    """Write the opening: a sentence and a picture for each behaviour, the table of answers, the rule."""
    ablate = findings.first(AblateResults)
    tested = ablate.verdict.dictionaries.get(TESTED, {})
    weak = findings.weak(tested)
    unit = next(unit for unit, summary in findings.summaries.items() if summary.stage == "ablate")
    table = load_effects(findings.folders[unit])
    blocks: list[Block] = []
    for name, result in tested.items():
        blocks.append(Text(headline(behaviour(name), result), strong=True))
        if name in weak:
            blocks.append(Text(warn_weak(weak[name]), alarm=True))
        blocks.append(control_picture(f"ablation_{name}", behaviour(name), table, name, result, draw))
    for name, reason in (ablate.verdict.untested or {}).items():
        blocks.append(Text(f"{behaviour(name)} is not testable: {reason}.", alarm=True))
    note = (
        "Effect: logit difference lost when the top features are ablated, with its 95 % interval. Controls change the "
        "site as much as the top features: their median effect, the 95th percentile, how many times that the top "
        "features cost (×), and the corrected p-value. "
        "Shares: what the top features take from this answer's logit difference, and the 95th percentile of what they "
        "take from those of other likely tokens. Simpler bases: whether the top features cost more than directions "
        "of these that change the site as much. Left: share of the logit difference that is left where so many "
        "features alone are kept, all others at their means; with the error term, and without it."
    )
    caption = f"The six questions, for the {counted(ablate.k, 'top feature')} of each behaviour"
    if weak:
        note += f" {WEAK}"
    rows = {_titled(name, weak): result for name, result in tested.items()}
    blocks.append(table_of_answers(caption, "Behaviour", rows, note))
    blocks += seed_table("Behaviour", ablate.verdict.dictionaries, ablate.dictionary, weak)
    if not any(result.placebo.answer == "yes" for result in tested.values()):
        blocks.append(Text("For no behaviour are the top features shown to be specific to its answer.", strong=True))
    blocks.append(rule_in_full(ablate.verdict.rule))
    return Section("The answer", tuple(blocks))


def _titled(name: str, weak: Container[str]) -> str:
    """Return a behaviour's title, with a mark if it is weak."""
    return mark_weak(behaviour(name), name in weak)


def headline(title: str, result: BehaviourVerdict) -> str:
    """Return what ablation costs and what the controls cost, in one sentence."""
    objective, ablation = next(iter(result.ablation.items()))
    assert ablation.effect is not None
    share = (result.placebo.parts or {}).get("share")
    cost = f"{number(ablation.effect.mean)} {ABLATION_READOUTS[objective][2]}"
    cost += f", {percent(share.mean)}," if share else ""
    some = counted(len(result.features), "feature")
    text = f"{title}: ablating {some} costs {cost} of {ABLATION_READOUTS[objective][0]}"
    parts = []
    for answered, words in (
        (result.random, "random features that change the site as much cost"),
        (None if objective == "answer_log_prob" else result.placebo, "features chosen for other tokens cost"),
        (result.trained, "those of untrained dictionaries cost"),
    ):
        if answered and answered.numbers:
            parts.append(f"{words} {number(answered.numbers['median'])}")
    if objective == "answer_log_prob" and (numbers := result.placebo.numbers):
        # Of benchmarks question 3 is about another quantity, which must not stand beside the text's log-likelihood.
        parts.append(
            f"of {ABLATION_READOUTS['answer_margin'][0]} the top features cost {number(numbers['top'])} nats, sets "
            f"chosen for corrupted answers {number(numbers['median'])}"
        )
    if share and result.placebo.numbers:
        high = percent(result.placebo.numbers["share_high"])
        parts.append(f"19 of 20 other likely answers lose at most {high} under the same ablation")
    return signed(f"{text}; {'; '.join(parts)}." if parts else f"{text}.")


def rule_in_full(rule: str) -> Code:
    """Return the rule of a verdict, folded away."""
    return Code("The rule in full", "\n".join(textwrap.wrap(rule, 96)))


def details(findings: Findings) -> list[Section]:
    """Write the answers to the six questions for each behaviour, in sentences with their figures."""
    ablate, weak = findings.first(AblateResults), findings.first(BaselineResults).weak
    intro = (
        "Square brackets hold 95 % bootstrap intervals over prompts within templates. p-values are corrected by Holm's "
        "method over the behaviours, within each question. Points are percentage points of accuracy on test prompts."
    )
    sections = [Section("The six questions", (Text(intro),))]
    for name, result in ablate.verdict.dictionaries[TESTED].items():
        kept = (_kept_table(result.enough),) if result.enough else ()
        blocks: tuple[Block, ...] = (Terms(_detail_items(result)), *kept, _template_table(result))
        if name in weak:
            blocks = (Text(f"Flagged: {sentence(weak[name])}", alarm=True), *blocks)
        sections.append(Section(f"Answers: {_titled(name, weak)}", blocks, level=3))
    return sections


def features(findings: Findings) -> list[Section]:
    """Describe the top features of each behaviour, with the contexts of the first ``SHOWN``."""
    ablate, weak = findings.first(AblateResults), findings.first(BaselineResults).weak
    is_integrated = findings.settings()["ablate"]["attribution"] == "integrated"
    gradient = "the mean gradient of the logit difference on the way to where all are replaced" if is_integrated else ""
    intro = (
        "Features were ranked by attribution: by how much the activation would fall times "
        f"{gradient or 'the gradient of the logit difference'}, summed over a prompt and averaged over the train "
        "prompts, an estimate of the effect. The drop is measured: "
        "what is lost on the test prompts when this feature alone is ablated. Features have numbers, and names only "
        "where they were interpreted. "
        "Below are the contexts of the captured text in which they fire most strongly; colour shows how strongly a "
        "feature fires on a token, and the maximum is bold and underlined. ↵ is a line break, ␣ a space."
    )
    sections = [Section("The features", (Text(intro),))]
    labels = labels_in(findings.folders, ablate.dictionary)
    make_strips = _make_strips(findings, labels) if findings.examples else None
    for name, top in ablate.top.items():
        strips = [make_strips(name, item) for item in top[:SHOWN] if not item.site] if make_strips else []
        blocks: list[Block] = [_feature_table(top, labels), *strips]
        importance = (ablate.importance or {}).get(name)
        if importance:
            count = importance.significant
            significant = (
                "none can have a significant effect with so few prompts"
                if count is None
                else f"{count:,} {'has' if count == 1 else 'have'} a significant effect (family-wise p at most 0.05)"
            )
            text = (
                f"Of all {importance.features:,} live features, each ablated alone, {significant}. The effect "
                f"has a rank correlation of {number(importance.attribution_correlation)} with attribution, and of "
                f"{number(importance.activation_correlation)} with the correlation of activation and logit difference."
            )
            blocks.insert(1, Text(text))
        sections.append(Section(f"Features: {_titled(name, weak)}", tuple(blocks), level=3))
    return sections


def _bases_phrase(result: BehaviourVerdict) -> str:
    """Return the comparisons with simpler bases: "more than MLP neurons; no significant difference from ..."."""
    words = {
        "more": "more than",
        "less": "less than",
        "equivalent": "equivalent to",
        "no significant difference": "no significant difference from",
        "not testable": "not testable against",
    }
    by_answer: dict[str, list[str]] = {}
    for basis, comparison in result.bases.items():
        by_answer.setdefault(comparison.answer, []).append(BASIS_NAMES.get(basis, basis))
    return "; ".join(f"{words[answer]} {', '.join(bases)}" for answer, bases in by_answer.items()) or "not tested"


def control_picture(
    name: str, title: str, table: EffectsTable, tested: str, result: BehaviourVerdict, draw: Draw
) -> Picture:
    """Return the picture of the top features beside all kinds of controls at one dose.

    Args:
      name: names the figure's file.
      title: the behaviour or benchmark in words.
      table: the effects table.
      tested: the behaviour or benchmark in the table.
      result: the verdict on it.
      draw: draws a figure.
    """
    objective, ablation = next(iter(result.ablation.items()))
    assert ablation.effect is not None
    prompts = table.select_prompts(tested)

    def means(edits: Sequence[EditDefinition]) -> np.ndarray:
        return table.drops(edits, prompts, objective).mean(axis=1)

    def of_dose(group: str) -> list[EditDefinition]:
        """Return a group's edits but those in which all directions together change the site less than T does."""
        return table.reaching(table.select_edits(tested, group), prompts, result.dose)

    top = table.select_edits(tested, "top")
    groups = dict.fromkeys(edit.group for edit in table.edits if edit.behaviour == tested)
    bases = {
        BASIS_NAMES.get(group.removeprefix(BASIS), group.removeprefix(BASIS)): float(means(edits[-1:])[0])
        for group in groups
        if group.startswith(BASIS) and (edits := of_dose(group))
    }
    controls = {group: means(of_dose(group)) for group in CONTROLS}
    unit = f"{ABLATION_READOUTS[objective][0].removeprefix('the ')} lost"
    caption = (
        "Every point is a set of features, or of directions, that changes the site as much as the top features do. "
        "Orange: the top features with their 95 % interval, and, to the left of it, ablated by a fifth, two fifths and "
        f"so on. {fooled_sentence(result.fooled, result.placebo_sets)}"
    )
    if objective == "answer_log_prob":
        caption += f" Question 3 is not shown: it compares losses of {ABLATION_READOUTS['answer_margin'][0]}."
    alt = signed(f"{title}. {ablation.sentence} {result.random.sentence} {result.placebo.sentence}")
    fractions = {edit.fraction: float(drop) for edit, drop in zip(top, means(top), strict=True)}
    return draw(name, control_strips(title, fractions, ablation.effect, controls, bases, unit), caption, alt)


@styled
def control_strips(
    title: str,
    top: Mapping[float, float],
    effect: Interval,
    controls: Mapping[str, np.ndarray],
    bases: Mapping[str, float],
    unit: str = "logit difference lost",
) -> "Figure":
    """Draw the effect of the top features beside the effects of each kind of control, a strip of points a kind.

    Args:
      title: the behaviour.
      top: effect of the top features by the fraction that is ablated.
      effect: their effect, ablated whole.
      controls: effects by kind, one of ``CONTROLS``.
      bases: effect of each simpler basis, by name.
      unit: the effect in words.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = panels((4.1,), (title,))
    place_A = [0.35 * (fraction - 1) for fraction in top]
    axes.plot(place_A, list(top.values()), "-", color=ORANGE, marker="D", markersize=3.5, linewidth=1, zorder=3)
    axes.errorbar(
        [0], [effect.mean], yerr=style.error_lengths(effect), fmt="D", color=ORANGE, capsize=3, elinewidth=1.8, zorder=4
    )
    axes.axhline(effect.mean, color=ORANGE, linewidth=0.8, linestyle=":", zorder=1)
    labels = ["top features"]
    for group, drop_N in controls.items():
        if not len(drop_N):
            continue
        place = len(labels)
        # By the golden ratio: neighbours in the order of drawing stand apart, and every run draws the same picture.
        shift_N = (np.arange(len(drop_N)) * 0.618034) % 1.0 - 0.5
        axes.plot(place + 0.6 * shift_N, drop_N, "o", color=_COLOURS[group], markersize=3.2, alpha=0.6, zorder=2)
        axes.plot([place - 0.36, place + 0.36], [np.median(drop_N)] * 2, color=INK, linewidth=1.6, zorder=3)
        labels.append(f"{len(drop_N)} {_STRIPS[group]}")
    for place, (name, drop) in enumerate(bases.items()):
        marker = _MARKERS[place % len(_MARKERS)]
        axes.plot([len(labels)], [drop], marker, color=_COLOURS["bases"], markersize=5, zorder=3, label=name)
    if bases:
        labels.append("simpler bases")
        legend(axes, 1)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(labels)), [textwrap.fill(label, 9) for label in labels])
    axes.set(ylabel=unit, xlim=(-0.6, len(labels) - 0.4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    return figure


def table_of_answers(caption: str, what: str, verdicts: Mapping[str, BehaviourVerdict], note: str) -> Table:
    """Return the table of the answers to all questions.

    Args:
      caption: caption of the table.
      what: heading of the first column.
      verdicts: title of a row -> its verdict.
      note: a line below it.
    """
    columns = {what: lambda title, _: title} | _answer_columns(list(verdicts.values()))
    return Table.of(caption, verdicts.items(), columns, words=set(columns), note=note)


def _answer_columns(results: Sequence[BehaviourVerdict]) -> dict[str, Callable[..., str]]:
    """Return the columns of the answers in these verdicts, made from rows that end in one."""
    objective, accuracy = next(iter(results[0].ablation)), "top1" if "top1" in results[0].ablation else "accuracy"
    accuracy_name = ABLATION_READOUTS[accuracy][0]

    def fooled(*row: Any) -> str:
        return MISSING if row[-1].fooled is None else f"{row[-1].fooled} of {row[-1].placebo_sets}"

    columns: dict[str, Callable[..., str]] = {
        f"1. Effect, {ABLATION_READOUTS[objective][2]}": lambda *row: _effect_cell(row[-1].ablation[objective]),
        f"{accuracy_name[:1].upper()}{accuracy_name[1:]}, points": lambda *row: _effect_cell(
            row[-1].ablation[accuracy], 0, 100
        ),
        "2. More than random": lambda *row: _set_cell(row[-1].random),
        "Placebo sets that pass 2": fooled,
        "3. Specific": lambda *row: _set_cell(row[-1].placebo),
        "Shares": lambda *row: _share_cell(row[-1].placebo),
        "4. Training mattered": lambda *row: _set_cell(row[-1].trained),
        "5. Selective": lambda *row: row[-1].selective.answer,
    }
    if any(result.bases for result in results):
        columns["Simpler bases"] = lambda *row: _bases_phrase(row[-1])
    if any(result.enough for result in results):
        columns["6. Left"] = lambda *row: _enough_cell(row[-1])
    return columns


def seed_table(
    what: str, dictionaries: Mapping[str, Mapping[str, BehaviourVerdict]], tested: str, weak: Container[str] = ()
) -> tuple[()] | tuple[Table]:
    """Return the table of the six answers by dictionary; nothing where one dictionary was tested.

    Args:
      what: what the dictionaries were tested on.
      dictionaries: a verdict's answers, by dictionary and by what was tested.
      tested: name of the tested dictionary.
      weak: behaviours of which the model is unsure, which are marked.
    """
    if len(dictionaries) < 2:
        return ()
    rows = [
        (_titled(name, weak), tested if dictionary == TESTED else dictionary, results[name])
        for name in dictionaries[TESTED]
        for dictionary, results in dictionaries.items()
        if name in results
    ]
    columns: dict[str, Callable[..., str]] = {what: lambda *row: row[0], "Dictionary": lambda *row: row[1]}
    answers = _answer_columns([row[-1] for row in rows])
    columns |= {heading: show for heading, show in answers.items() if heading[0].isdigit()}
    note = (
        "Dictionaries that were trained alike but for their seed, each with top features and controls of its own. "
        "Question 4 compares each of them with the same untrained dictionaries, at the dose of the tested one. An "
        "answer that differs between seeds is about a dictionary, not about the model."
    )
    if any(name in weak for name in dictionaries[TESTED]):
        note += f" {WEAK}"
    return (Table.of("The questions in dictionaries of other seeds", rows, columns, words=set(columns), note=note),)


def _effect_cell(answer: CausalAnswer, digits: int = 2, scale: float = 1) -> str:
    return f"{answer.answer}: {interval(answer.effect, digits, scale)}" if answer.effect else answer.answer


def _set_cell(comparison: CausalAnswer) -> str:
    if comparison.numbers is None:
        return comparison.answer
    figures = comparison.numbers
    if comparison.answer == "not testable":
        too_few = figures["sets"] < figures["needed"]
        untested = "few features fire" if "pool" in figures else "no other answers"
        # Untestable p-values are not corrected: where one is, too few resamples alone keep it from an answer.
        why = "few resamples" if comparison.p_holm is not None else untested
        why = f"{figures['sets']:.0f} of {figures['needed']:.0f} sets" if too_few else why
        return f"not testable ({why})"
    ratio = over_controls(figures)
    times = f", × {number(ratio, 1)}" if ratio else ""
    quantiles = f"{number(figures['median'])}, {number(figures['high'])}{times}"
    return f"{comparison.answer} ({quantiles}; p {comparison.p_holm:.2g})"


def _share_cell(comparison: CausalAnswer) -> str:
    if not comparison.parts or comparison.numbers is None:
        return MISSING
    return f"{percent(comparison.parts['share'].mean)}; {percent(comparison.numbers['share_high'])}"


def _enough_cell(result: BehaviourVerdict) -> str:
    if not result.enough:
        return MISSING
    first, last = result.enough[0], result.enough[-1]
    return "; ".join(
        f"{percent(kept.left.mean)}, {percent(without.mean if (without := kept.left_without_error) else None)} "
        f"with {kept.features}"
        for kept in (first, last)
    )


def _detail_items(result: BehaviourVerdict) -> tuple[tuple[str, str], ...]:
    ablation = " ".join(ablation.sentence for ablation in result.ablation.values())
    bases = " ".join(comparison.sentence for comparison in result.bases.values()) or "Not tested."
    items = [
        ("1. Effect", ablation),
        (
            "2. More than random features",
            f"{result.random.sentence} {fooled_sentence(result.fooled, result.placebo_sets)}",
        ),
        ("3. Specific to this answer", result.placebo.sentence),
        ("4. Did training matter", result.trained.sentence),
        ("Simpler bases", bases),
        ("5. Selective", result.selective.sentence),
        ("6. Enough", enough_sentence(result.enough)),
    ]
    if result.replication:
        items.append(("Replication", result.replication.sentence))
    return tuple((title, signed(text)) for title, text in items)


def _kept_table(enough: Sequence[Kept]) -> Table:
    def controls(name: str, place: int) -> Callable[[Kept], str]:
        return lambda kept: percent(kept.controls[name][place]) if name in kept.controls else MISSING

    columns = {
        "Kept": lambda kept: str(kept.features),
        "Left, %": lambda kept: interval(kept.left, 0, 100),
        "by placebo sets": controls("placebo", 0),
        "by untrained dictionaries": controls("untrained", 0),
        "Without the error term, %": lambda kept: interval(kept.left_without_error, 0, 100),
        "by placebo sets, without it": controls("placebo", 1),
        "by untrained dictionaries, without it": controls("untrained", 1),
    }
    note = (
        "Share of the logit difference that is left where so many features alone are kept and all others are set to "
        "their means; of controls the median of up to three. The error term is what a dictionary does not explain: of "
        "an untrained one it holds nearly everything, so only shares without it compare dictionaries."
    )
    return Table.of("Are they enough?", [(kept,) for kept in enough], columns, stack=False, note=note)


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
            f"{item.feature} {item.site or (labels[item.feature].label if item.feature in labels else '')}".strip()
        ),
        "Logit difference lost": lambda item: interval(item.drop),
        "Attribution": lambda item: significant(item.attribution),
        "Fires on": lambda item: percent(item.firing_rate, 1),
        "Mean activation": lambda item: significant(item.mean_activation),
    }
    above = sum(item.drop.low > 0 for item in top)
    note = (
        f"In order of attribution. Ablated alone, {above} of {counted(len(top), 'feature')} "
        f"{'lowers' if len(top) == 1 else 'lower'} the logit difference with an interval above zero; of features "
        "without effect about one in forty would. Fires on: share of the tokens of the test prompts."
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
    every = findings.first(AblateResults).top
    tops = {name: {item.feature for item in top if not item.site} for name, top in every.items()}

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
