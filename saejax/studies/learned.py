"""The answers of a study: yes, no or cannot tell to each of its questions, for every row and benchmark.

A row may be a control whose answers are known (``--study.control``): a *relative* was tuned from the model of the first
row, so that both share most features; a *stranger* has random weights, so that nothing of it is shared, specific or
interpretable.
"""

from collections.abc import Iterator, Sequence

from saejax.interventions.falsify import CONTROL_GROUPS
from saejax.page.tables import Table, interval, number, percent
from saejax.statistics.intervals import wilson_of
from saejax.studies.primitives import LEVEL
from saejax.studies.results import (
    QUESTIONS,
    Answered,
    Asked,
    DriverFigures,
    LearnedFigures,
    PrimitiveFigures,
    StudyFigures,
    plain,
)
from saejax.studies.sheet import select
from saejax.wording import counted

MOST = 0.5  # share of the first row's features that have a partner, beyond chance


def learned(figures: StudyFigures) -> tuple[LearnedFigures, ...]:
    """Return the answer to each question for each row and benchmark whose features were ablated.

    Args:
      figures: all other figures of the study.
    """
    control_kind = {model.row: model.control for model in figures.models}
    answered = []
    for gate in figures.gates:
        answers = dict(_answers(figures, gate.row, gate.benchmark))
        for name, question in QUESTIONS.items():
            if name in answers:
                (answer, evidence), expected = answers[name], question.expected.get(control_kind[gate.row], "")
                answered.append(LearnedFigures(gate.row, gate.benchmark, name, answer, expected, evidence))
    return tuple(answered)


def _answers(figures: StudyFigures, row: str, benchmark: str) -> Iterator[tuple[Asked, tuple[Answered, str]]]:
    """Yield each question that was asked, with its answer and evidence."""
    here, first = dict(row=row, benchmark=benchmark), figures.models[0].row
    for baseline in select(figures.baselines, row=row, task=benchmark)[:1]:
        chance = baseline.chance or 0.0
        if "nats" not in baseline.measure:
            evidence = f"{percent(baseline.value.mean, 1)}; by guessing {percent(chance, 1)}"
            # Of so few items even right answers to all would be no evidence.
            is_testable = wilson_of(1.0, baseline.n).low > chance
            yield "solves", (plain(baseline.value.low > chance if is_testable else None), evidence)
    effects = select(figures.effects, **here)
    for effect in effects:
        yield "effect", (plain(effect.lowers), f"{interval(effect.nats_drop)} nats")
        yield "random", (plain(effect.random), f"random sets at equal dose: {number(effect.random_nats)} nats")
        final = f"final answer: {number(effect.answer_nats)} nats; placebo sets {number(effect.placebo_nats)}"
        yield "placebo", (plain(effect.placebo), final)
        untrained = f"untrained dictionaries at equal dose: {number(effect.untrained_nats)} nats"
        yield "trained", (plain(effect.trained), untrained)
    by_gate: dict[str, Answered] = {"interpretable": "yes", "cannot tell": "cannot tell"}
    for gate in select(figures.gates, **here):
        yield "gate", (by_gate.get(gate.gate, "no"), f"{gate.gate}: {gate.reason}")
    for drivers in select(figures.drivers, **here, group="tested"):
        controls = [group for group in select(figures.drivers, **here) if group.group != "tested"]
        shares = [f"{percent(group.context.mean)} of {group.features}, {group.group}" for group in controls]
        measured = {group.group for group in controls}
        shares += [f"none of the {name} fires" for name in CONTROL_GROUPS if name not in measured]
        evidence = f"{percent(drivers.context.mean)} of {drivers.features} by context; {'; '.join(shares)}"
        yield "context", (_driven(drivers, controls), evidence)
    groups = select(figures.primitives, **here)
    # With a single category there is no other with which it could be compared.
    if any(effect.categories > 1 for effect in effects):
        yield "primitives", _primitives(groups, any(effect.can_name for effect in effects))
    ranked: tuple[Asked, ...] = ("features", "items")
    for name in ranked if row != first else ():
        for pair in select(figures.alignment, first=first, second=row, benchmark=benchmark, by=name):
            aligned, evidence = plain(pair.aligned), f"rank correlation {number(pair.rank_correlation)}"
            if pair.shared is not None and pair.shared_null is not None:
                partners = f"{percent(pair.shared)} have a partner, by chance {percent(pair.shared_null)}"
                is_shared = pair.shared - pair.shared_null > MOST
                yield "shared", (plain(is_shared), partners)
                if aligned == "cannot tell" and not is_shared:
                    # Too few partners to rank, among features that are mostly others.
                    aligned, evidence = "no", f"{evidence}; {partners}"
            elif name == "features":
                yield "shared", ("cannot tell", "a dictionary has no feature that fires often enough to have a partner")
            yield name, (aligned, evidence)


def _primitives(groups: Sequence[PrimitiveFigures], can_name: bool) -> tuple[Answered, str]:
    """Return whether a named group does more than its controls and recurs in half of the other seeds.

    Args:
      groups: stable groups of a row on a benchmark.
      can_name: whether there are enough items that a group could be named.
    """
    named = [group for group in groups if group.name]
    held = [group for group in named if holds(group)]
    number = f"{len(held)} of {len(named)} groups" if named else "no group"
    evidence = f"{number} named after a category, {counted(len(groups), 'stable group')}"
    if not can_name:
        return "cannot tell", f"{evidence}; there are too few items to name any"
    if not held and any(map(is_untold, named)):
        return "cannot tell", evidence
    return plain(bool(held)), evidence


def holds(group: PrimitiveFigures) -> bool:
    """Return whether a group is named, does more than its controls, and recurs in half of the other seeds.

    With the row's other groups it has to recur more often than with names permuted over categories.
    """
    recurs = 0 < group.seeds <= 2 * group.recurs and group.p_recurs is not None and group.p_recurs <= LEVEL
    return bool(group.name) and group.more == "yes" and recurs


def is_untold(group: PrimitiveFigures) -> bool:
    """Return whether it cannot be told if a named group does more than its controls and recurs."""
    return group.more == "not testable" or (group.more == "yes" and group.p_recurs is None)


def _driven(drivers: DriverFigures, controls: Sequence[DriverFigures]) -> Answered:
    """Return whether context drives more features than tokens do, and more than of each control group.

    It cannot be told where no feature of any group is decided. A no to either decides. Otherwise it cannot be told
    where the intervals of context and tokens overlap, or a control group is missing or so small that no shares could
    differ. Control groups are compared by Fisher's exact test: a yes needs p of at most ``LEVEL`` against each, so that
    it has no more than this.
    """
    from scipy.stats import fisher_exact

    # Of too few texts no feature of any group is decided, whatever drives it.
    if all(group.undecided.mean == 1 for group in (drivers, *controls)):
        return "cannot tell"
    if drivers.tokens.low > drivers.context.high:
        return "no"

    def exceeds(hits: int, control: DriverFigures, control_hits: int) -> bool:
        table = [(hits, drivers.features - hits), (control_hits, control.features - control_hits)]
        return bool(fisher_exact(table, "greater").pvalue <= LEVEL)

    hits = round(drivers.context.mean * drivers.features)
    # A group of which not even the greatest difference is significant denies nothing.
    able = [group for group in controls if exceeds(drivers.features, group, 0)]
    if not all(exceeds(hits, group, round(group.context.mean * group.features)) for group in able):
        return "no"
    is_told = drivers.context.low > drivers.tokens.high and {group.group for group in able} >= {*CONTROL_GROUPS}
    return "yes" if is_told else "cannot tell"


def overview(figures: StudyFigures) -> tuple[tuple[str, str], ...]:
    """Return which rows have an effect beyond all controls, which do not, and what could not be tested, in words.

    Where a row is a control, also how many of its known answers were found.
    """
    dictionary = {(effect.row, effect.benchmark): effect.dictionary for effect in figures.effects}
    lines: dict[str, list[str]] = {"Beyond all controls": [], "Not beyond all": [], "Could not be tested": []}
    for gate in figures.gates:
        where = f"{gate.row}, {dictionary[gate.row, gate.benchmark]} on {gate.benchmark}"
        answers = (
            f"an effect: {gate.effect}; more than random lists: {gate.random}; specific: {gate.placebo}; more than "
            f"untrained dictionaries: {gate.trained}; in {gate.agreeing} of {gate.seeds} seeds"
        )
        if gate.gate == "interpretable":
            lines["Beyond all controls"].append(f"{where} ({answers})")
        elif gate.gate != "cannot tell":
            lines["Not beyond all"].append(f"{where}: {gate.gate} ({answers})")
        else:
            # The reason names the controls, and the items that are needed where there were too few.
            lines["Could not be tested"].append(f"{where}: {gate.reason.rstrip('.')}")
    summary = [(name, "; ".join(some) + "." if some else "None.") for name, some in lines.items()]
    if control_answers := [answer for answer in figures.learned if answer.expected]:
        summary.append(("Known answers", _compare_known(control_answers)))
    return tuple(summary)


def _compare_known(answers: Sequence[LearnedFigures]) -> str:
    """Return how many answers of control rows are the right ones, and which others are not, with their evidence."""
    wrong = [answer for answer in answers if answer.answer not in (answer.expected, "cannot tell")]
    untold = sum(answer.answer == "cannot tell" for answer in answers)
    text = f"{len(answers) - len(wrong) - untold} of {len(answers)} were found, {untold} cannot be told."
    differing = "; ".join(
        f"{QUESTIONS[answer.question].heading.lower()}, {answer.row} on {answer.benchmark}: {answer.answer}, expected "
        f"{answer.expected} ({answer.evidence})"
        for answer in wrong
    )
    return f"{text} Contradicted: {differing}." if wrong else text


def answers_table(answers: Sequence[LearnedFigures]) -> Table:
    """Return the first table of the page, rows and benchmarks by questions; a cell is empty if that was not asked."""
    cells = {
        (answer.row, answer.benchmark, answer.question): f"{answer.answer} (expected: {answer.expected})"
        if answer.expected
        else answer.answer
        for answer in answers
    }
    places = dict.fromkeys((answer.row, answer.benchmark) for answer in answers)
    lines = tuple((", ".join(place), *(cells.get((*place, name), "") for name in QUESTIONS)) for place in places)
    columns = ("Row", *(question.heading for question in QUESTIONS.values()))
    note = "Expected: the answer that a control row must give. The sections below say how each question is answered."
    return Table("Rows by questions", columns, lines, frozenset(range(len(columns))), note=note)
