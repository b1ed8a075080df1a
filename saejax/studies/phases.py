"""The five phases of the former study on one page: what each test found in each row, beside its control.

1. Ground truth of effects: which features change the output at all.
2. Known features: are they found where the truth is known?
3. Probes: what can be read linearly.
4. Causal tests: what the answers depend on.
5. Layers and models: what is shared.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from saejax.ground_truth.results import TruthResults
from saejax.interventions.answers import AblateResults
from saejax.interventions.probing import ProbeResults
from saejax.page.findings import Findings
from saejax.page.tables import interval, number, percent
from saejax.results import Interval
from saejax.studies.benchmark_results import StudyResults
from saejax.studies.results import Answered, PhaseFigures, StudyFigures

EFFECTS, KNOWN = "1. Which features change the output", "2. Are known features found"
PROBES, CAUSES, LAYERS = "3. What can be read", "4. What causes the answers", "5. Layers and models"
ORDER = (EFFECTS, KNOWN, PROBES, CAUSES, LAYERS)


def phases(figures: StudyFigures, rows: Mapping[str, Findings]) -> tuple[PhaseFigures, ...]:
    """Return every test that was run, phase by phase.

    Args:
      figures: of the study, but for these and what is concluded.
      rows: the findings of each row, by name.
    """
    every = [*_effects(rows), *_known_features(rows), *_probes(figures, rows), *_causes(figures), *_layers(figures)]
    return tuple(sorted(every, key=lambda test: ORDER.index(test.phase)))


def _yes(is_beyond: bool) -> Answered:
    return "yes" if is_beyond else "no"


def _effects(rows: Mapping[str, Findings]) -> Iterator[PhaseFigures]:
    for row, findings in rows.items():
        for results in findings.each(AblateResults).values():
            for name, summary in (results.importance or {}).items():
                result = f"{summary.significant} of {summary.features} features"
                control = "corrected for all features: 5 % of studies would have one by chance"
                test = "features whose ablation alone changes the answer"
                yield PhaseFigures(EFFECTS, test, f"{row}, {name}", result, control, _yes(summary.significant > 0))
        for name, study in findings.each(StudyResults).items():
            above = sum(effect.drop.low > 0 for effect in study.top)
            result = f"{above} of {len(study.top)} top features"
            control = f"{0.025 * len(study.top):.1f} expected by chance"
            test = "top features whose ablation alone lowers the answers"
            # Two above what chance gives, as single ones are not corrected for their number.
            yield PhaseFigures(EFFECTS, test, f"{row}, {name}", result, control, _yes(above >= 3))


def _known_features(rows: Mapping[str, Findings]) -> Iterator[PhaseFigures]:
    results = [(row, truth) for row, findings in rows.items() for truth in findings.each(TruthResults).values()]
    for row, truth in results:
        trained = [each.scores.f1 for each in truth.dictionaries if not each.control]
        # Controls are a unit of their own, one for all kinds of a row.
        units = [each for name, each in results if name == row]
        controls = [each.scores.f1 for unit in units for each in unit.dictionaries if each.control]
        for best in sorted(trained, key=lambda f1: -f1.mean)[:1]:
            control = max(controls, key=lambda f1: f1.mean, default=None)
            yield PhaseFigures(
                KNOWN,
                "features of a synthetic world that a dictionary finds",
                f"{row}, {truth.kind}",
                f"F1 {interval(best)}",
                f"frozen random decoder: {interval(control)}" if control else "none in this row",
                "cannot tell" if control is None else _yes(best.low > control.high),
            )
    if not results:
        test = "features of a synthetic world that a dictionary finds"
        yield PhaseFigures(KNOWN, test, "no row", "not run here: make demo-truth", "", "cannot tell")


def _probes(figures: StudyFigures, rows: Mapping[str, Findings]) -> Iterator[PhaseFigures]:
    for row, findings in rows.items():
        for results in findings.each(ProbeResults).values():
            for label in results.labels:
                for probe in label.probes[-1:]:
                    where = f"{row}, {label.behaviour or 'all behaviours'}: {label.label}"
                    result = f"accuracy {interval(probe.accuracy, 1, 100)} %"
                    control = f"shuffled labels {interval(probe.shuffled, 1, 100)} %"
                    test = f"linear probe of all {probe.input}"
                    yield PhaseFigures(PROBES, test, where, result, control, _yes(probe.p_holm <= 0.05))
    for row, benchmark in dict.fromkeys((label.row, label.benchmark) for label in figures.labels):
        labels = [label for label in figures.labels if (label.row, label.benchmark) == (row, benchmark)]
        tested = [
            association
            for association in figures.associations
            if (association.row, association.benchmark) == (row, benchmark)
        ]
        associated, features = sum(label.associated for label in labels), max(label.features for label in labels)
        shuffled = sum(label.shuffled for label in labels)
        result = f"{associated} associations of {features} features with {len(labels)} labels"
        control = f"permuted labels: {number(shuffled)}"
        test = "features that go with a category or with right answers"
        yield PhaseFigures(PROBES, test, f"{row}, {benchmark}", result, control, _yes(associated > max(shuffled, 0.5)))
        if tested:
            right = sum(association.probe == "yes" for association in tested)
            result, control = f"{right} of {len(tested)} top features", "permuted labels, corrected by Holm's method"
            test = "a probe of one feature finds the label on new items"
            yield PhaseFigures(PROBES, test, f"{row}, {benchmark}", result, control, _yes(right > 0))


def _causes(figures: StudyFigures) -> Iterator[PhaseFigures]:
    for effect in figures.effects:
        where, result = f"{effect.row}, {effect.benchmark}", f"{interval(effect.nats_drop)} nats"
        for test, mean, answer in (
            ("top features lower the answers more than random sets at equal dose", effect.random_nats, effect.random),
            ("more than sets chosen for other answers", effect.placebo_nats, effect.placebo),
        ):
            beyond: Answered = "yes" if answer == "yes" else "no" if answer == "no" else "cannot tell"
            yield PhaseFigures(CAUSES, test, where, result, f"{number(mean)} nats", beyond)
    ablated = [primitive for primitive in figures.primitives if primitive.effect is not None]
    for primitive in ablated:
        beyond = "yes" if primitive.more == "yes" else "no" if primitive.more == "no" else "cannot tell"
        title = primitive.name or "a group without a name"
        yield PhaseFigures(
            CAUSES,
            f"{len(primitive.features)} features of {title} lower its answers",
            f"{primitive.row}, {primitive.benchmark}",
            f"{interval(primitive.effect)} nats",
            f"random sets {number(primitive.random)}, other answers {number(primitive.placebo)} nats "
            f"({primitive.sets} sets of the kind with fewer, {primitive.needed} needed)",
            beyond,
        )


def _layers(figures: StudyFigures) -> Iterator[PhaseFigures]:
    for row, measure in dict.fromkeys((pair.row, pair.measure) for pair in figures.transfer):
        pairs = [pair for pair in figures.transfer if (pair.row, pair.measure) == (row, measure)]
        shared, null = (_mean([getattr(pair, name) for pair in pairs]) for name in ("shared", "shared_null"))
        above = sum(pair.shared.low > pair.shared_null.high for pair in pairs)
        result = f"{percent(shared, 1)} shared, mean of {len(pairs)} pairs"
        test = f"features that dictionaries of a row share, by {measure}"
        yield PhaseFigures(LAYERS, test, row, result, f"by chance {percent(null, 1)}", _yes(2 * above > len(pairs)))
    for text in figures.tracking:
        result = f"{text.hurt} of {text.tests} steps" if text.tests else "no step could be tested"
        test = "steps of a solution that their features lower more than random sets"
        answer: Answered = _yes(2 * text.hurt >= text.tests) if text.tests else "cannot tell"
        yield PhaseFigures(LAYERS, test, f"{text.row}, {text.text}", result, "5 % by chance, corrected", answer)
    for pair in figures.alignment:
        where = f"{pair.first} and {pair.second}, {pair.benchmark}"
        result, control = f"rank correlation {number(pair.rank_correlation)}", f"placebo {number(pair.control)}"
        beyond = "cannot tell" if pair.aligned is None else _yes(pair.aligned)
        yield PhaseFigures(LAYERS, f"the same {pair.by} matter in two models", where, result, control, beyond)


def _mean(values: list[Interval]) -> float:
    return float(np.mean([value.mean for value in values])) if values else 0.0


def disagreements(figures: StudyFigures) -> tuple[str, ...]:
    """Return where two phases disagree, in words: features that go with a label, but that it does not depend on."""
    lines = []
    for row, benchmark in dict.fromkeys(
        (association.row, association.benchmark) for association in figures.associations
    ):
        where = f"{row} on {benchmark}"
        tested = [
            association
            for association in figures.associations
            if (association.row, association.benchmark) == (row, benchmark) and association.agree is not None
        ]
        read = sum(association.probe == "yes" and association.causal == "no" for association in tested)
        used = sum(association.probe == "no" and association.causal == "yes" for association in tested)
        if read:
            lines.append(
                f"{where}: of {len(tested)} top features {read} tell the label of new items (phase 3), but ablating "
                "them does not cost those items more (phase 4)."
            )
        if used:
            lines.append(
                f"{where}: {used} of {len(tested)} top features matter more for items of a label (phase 4), but do not "
                "tell it (phase 3)."
            )
    by_key = {(effect.row, effect.benchmark): effect for effect in figures.effects}
    for (row, benchmark), effect in by_key.items():
        alone = [test for test in figures.phases if test.phase == EFFECTS and test.row == f"{row}, {benchmark}"]
        if effect.placebo == "no" and any(test.answer == "yes" for test in alone):
            lines.append(
                f"{row} on {benchmark}: features change the output (phase 1), but no more than features chosen for "
                "other answers (phase 4)."
            )
    return tuple(lines)
