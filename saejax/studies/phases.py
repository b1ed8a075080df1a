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
from saejax.stages.study.results import StudyResults
from saejax.studies.results import PhaseFigures, StudyFigures, plain
from saejax.studies.sheet import select

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


def _effects(rows: Mapping[str, Findings]) -> Iterator[PhaseFigures]:
    for row, findings in rows.items():
        for results in findings.each(AblateResults).values():
            for name, summary in (results.importance or {}).items():
                result = f"{summary.significant} of {summary.features} features"
                control = "corrected for all features: 5 % of studies would have one by chance"
                test = "features whose ablation alone changes the answer"
                yield PhaseFigures(EFFECTS, test, f"{row}, {name}", result, control, plain(summary.significant > 0))
        for name, study in findings.each(StudyResults).items():
            above = sum(effect.drop.low > 0 for effect in study.top)
            result = f"{above} of {len(study.top)} top features"
            control = f"{0.025 * len(study.top):.1f} expected by chance"
            test = "top features whose ablation alone lowers the answers"
            # Two above what chance gives, as single ones are not corrected for their number.
            yield PhaseFigures(EFFECTS, test, f"{row}, {name}", result, control, plain(above >= 3))


def _known_features(rows: Mapping[str, Findings]) -> Iterator[PhaseFigures]:
    results = [(row, truth) for row, findings in rows.items() for truth in findings.each(TruthResults).values()]
    for row, truth in results:
        trained = [dictionary.scores.f1 for dictionary in truth.dictionaries if not dictionary.control]
        # Controls are a unit of their own, one for all kinds of a row.
        units = [truth for name, truth in results if name == row]
        controls = [dictionary.scores.f1 for unit in units for dictionary in unit.dictionaries if dictionary.control]
        for best in sorted(trained, key=lambda f1: -f1.mean)[:1]:
            control = max(controls, key=lambda f1: f1.mean, default=None)
            yield PhaseFigures(
                KNOWN,
                "features of a synthetic world that a dictionary finds",
                f"{row}, {truth.kind}",
                f"F1 {interval(best)}",
                f"frozen random decoder: {interval(control)}" if control else "none in this row",
                plain(None if control is None else best.low > control.high),
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
                    yield PhaseFigures(
                        PROBES,
                        test,
                        where,
                        result,
                        control,
                        plain(None if probe.p_holm is None else probe.p_holm <= 0.05),
                    )
    for row, benchmark in dict.fromkeys((label.row, label.benchmark) for label in figures.labels):
        labels = select(figures.labels, row=row, benchmark=benchmark)
        tested = select(figures.associations, row=row, benchmark=benchmark)
        associated, features = sum(label.associated for label in labels), max(label.features for label in labels)
        shuffled = sum(label.shuffled for label in labels)
        result = f"{associated} associations of {features} features with {len(labels)} labels"
        control = f"permuted labels: {number(shuffled)}"
        test = "features that go with a category or with right answers"
        yield PhaseFigures(PROBES, test, f"{row}, {benchmark}", result, control, plain(associated > max(shuffled, 0.5)))
        if tested:
            right = sum(association.probe == "yes" for association in tested)
            result, control = f"{right} of {len(tested)} top features", "permuted labels, corrected by Holm's method"
            test = "a probe of one feature finds the label on new items"
            yield PhaseFigures(PROBES, test, f"{row}, {benchmark}", result, control, plain(right > 0))


def _causes(figures: StudyFigures) -> Iterator[PhaseFigures]:
    for effect in figures.effects:
        where, result = f"{effect.row}, {effect.benchmark}", f"{interval(effect.nats_drop)} nats"
        margin = f"{number(effect.answer_nats)} nats"
        for test, measured, mean, answer in (
            ("top features lower the answers more than random sets", result, effect.random_nats, effect.random),
            ("the final answer, more than sets for corrupted answers", margin, effect.placebo_nats, effect.placebo),
            ("more than untrained dictionaries", result, effect.untrained_nats, effect.trained),
        ):
            yield PhaseFigures(CAUSES, test, where, measured, f"{number(mean)} nats", plain(answer))
    for primitive in (group for group in figures.primitives if group.effect is not None):
        title = primitive.name or "a group without a name"
        yield PhaseFigures(
            CAUSES,
            f"{len(primitive.features)} features of {title} lower its answers",
            f"{primitive.row}, {primitive.benchmark}",
            f"{interval(primitive.effect)} nats",
            f"random sets {number(primitive.random)}, corrupted answers {number(primitive.placebo)} nats "
            f"({primitive.sets} sets of the kind with fewer, {primitive.needed} needed)",
            plain(primitive.more),
        )


def _layers(figures: StudyFigures) -> Iterator[PhaseFigures]:
    for row, measure in dict.fromkeys((pair.row, pair.measure) for pair in figures.transfer):
        pairs = select(figures.transfer, row=row, measure=measure)
        shared, null = (np.mean([getattr(pair, name).mean for pair in pairs]) for name in ("shared", "shared_null"))
        above = sum(pair.shared.low > pair.shared_null.high for pair in pairs)
        result = f"{percent(float(shared), 1)} shared, mean of {len(pairs)} pairs"
        test = f"features that dictionaries of a row share, by {measure}"
        yield PhaseFigures(
            LAYERS, test, row, result, f"by chance {percent(float(null), 1)}", plain(2 * above > len(pairs))
        )
    for text in figures.tracking:
        result = f"{text.hurt} of {text.tests} steps" if text.tests else "no step could be tested"
        test = "steps of a solution that their features lower more than random sets"
        answer = plain(2 * text.hurt >= text.tests if text.tests else None)
        yield PhaseFigures(LAYERS, test, f"{text.row}, {text.text}", result, "5 % by chance, corrected", answer)
    for pair in figures.alignment:
        where = f"{pair.first} and {pair.second}, {pair.benchmark}"
        result, control = f"rank correlation {number(pair.rank_correlation)}", f"placebo {number(pair.control)}"
        test = f"the same {pair.by} matter in two models"
        yield PhaseFigures(LAYERS, test, where, result, control, plain(pair.aligned))


def disagreements(figures: StudyFigures) -> tuple[str, ...]:
    """Return where two phases disagree, in words: features that go with a label, but that it does not depend on."""
    lines = []
    for row, benchmark in dict.fromkeys(
        (association.row, association.benchmark) for association in figures.associations
    ):
        where, here = f"{row} on {benchmark}", select(figures.associations, row=row, benchmark=benchmark)
        tested = [association for association in here if association.agree is not None]
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
    for effect in figures.effects:
        where = f"{effect.row}, {effect.benchmark}"
        if effect.placebo == "no" and select(figures.phases, phase=EFFECTS, row=where, answer="yes"):
            lines.append(
                f"{effect.row} on {effect.benchmark}: features change the output (phase 1), but no more than features "
                "chosen for corrupted answers (phase 4)."
            )
    return tuple(lines)
