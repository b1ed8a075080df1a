"""Criteria of a study's success, and the overall answer (gate) of a row on a benchmark.

Both are rules that are written down before any row runs. The overall answer is about log-likelihoods, which every model
has, however weak. "Interpretable" takes a yes against every control: random sets, placebo sets, untrained dictionaries
and dictionaries of other seeds. Beside it stands how many placebo sets also do more than random sets.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from scipy.special import ndtri

from saejax.interventions.answers import AblateResults, BehaviourVerdict, CausalAnswer
from saejax.page.findings import Findings
from saejax.page.tables import number, percent
from saejax.results import Interval
from saejax.studies import alignment
from saejax.studies.results import CriterionFigures, Gated, GateFigures, StudyFigures

LEVEL = 0.05  # of the overall answer, for each row and benchmark
SMALLEST = 0.5  # standard deviations of the log-likelihood between items: the smallest effect of interest
POWER, SEEDS = 0.8, 3  # of finding it; dictionaries, the tested one included
FAITHFUL = 0.8  # cross-entropy that a dictionary recovers
EPOCH = 4  # with whose loss the last one is compared, as the reasoning study did
#: The controls of questions 2 to 4, in words.
_CONTROLS = dict(random="random sets", placebo="placebo sets", trained="untrained dictionaries")
GATE = (
    "A row on a benchmark gets the first answer that holds. Cannot tell: whether ablation has an effect (1) or does "
    "more than random sets (2) is not testable, or it has no effect but one of "
    f"{SMALLEST:g} standard deviations of the log-likelihood between items would have been found in fewer than "
    f"{100 * POWER:g} % of cases. No signal: question 1 or 2 is answered no. Not specific: question 3, against placebo "
    "sets, is answered no. No better than untrained: question 4, against untrained dictionaries, is answered no. "
    "Cannot tell: question 3 or 4 is not testable or was not tested, or fewer than "
    f"{SEEDS} dictionaries that differ in their seed were tested. Interpretable: questions 1 to 3 are answered yes in "
    "at least two of three of these, and all four in the tested one. Unstable: everything else."
)
CRITERIA = (
    f"A study succeeds as far as these hold: every unit is done; every dictionary's loss is lower in the last epoch "
    f"than in epoch {EPOCH}; every dictionary recovers at least {FAITHFUL:g} of the cross-entropy; every row has a "
    "benchmark on which accuracy falls by more than the criterion for both replacements; every row has a benchmark on "
    "which the top features do more than random sets, placebo sets and untrained dictionaries (questions 2 to 4); "
    f"at least half of the features that fire have an effect of their own (family-wise p at most {LEVEL:g}); every "
    "comparison of two rows that can be made is aligned; every dictionary that was compared shares more features than "
    "by chance (95 % intervals apart) with another; of the chains of features that were measured through the layers at "
    "least half hold; and of the steps of solutions that were tested at least half are hurt by ablating their features "
    "at one layer."
)
RULES = dict(gate=GATE, alignment=alignment.RULE, criteria=CRITERIA)


def gate(row: str, benchmark: str, answers: Sequence[BehaviourVerdict], items: int, spread: float) -> GateFigures:
    """Return the overall answer for a row on a benchmark, a function of the verdict's answers alone.

    Args:
      row: its name.
      benchmark: its name.
      answers: those of the tested dictionary, then those of dictionaries of other seeds.
      items: of the benchmark that judged.
      spread: standard deviation of the reference answers' log-likelihood between these, without an edit, nats.
    """
    tested = answers[0]
    smallest = SMALLEST * spread
    needed = items_needed(_effect(tested).effect, items, smallest)
    holds = [[_effect(verdict).answer, verdict.random.answer, verdict.placebo.answer] for verdict in answers]
    agreeing = sum(three == ["yes"] * 3 for three in holds)
    answer, reason = _decide(tested, len(answers), agreeing)
    if answer == "no signal" and holds[0][0] == "no" and needed is not None and needed > items:
        answer = "cannot tell"
        reason += (
            f" With {items} items the power to find a drop of {number(smallest)} nats is short: about {needed:,} are "
            "needed."
        )
    if lacking := {name: text for name in _CONTROLS if (text := getattr(tested, name).answer) != "yes"}:
        listed = "; ".join(f"{_CONTROLS[name]}, {text}" for name, text in lacking.items())
        reason += f" Controls against which the answer is not yes: {listed}."
    return GateFigures(
        row=row,
        benchmark=benchmark,
        gate=answer,
        effect=holds[0][0],
        random=tested.random.answer,
        placebo=tested.placebo.answer,
        trained=tested.trained.answer,
        reason=reason,
        seeds=len(answers),
        agreeing=agreeing,
        items_needed=needed,
        smallest=smallest,
        fooled=tested.fooled / tested.placebo_sets if tested.fooled is not None else None,
    )


def _decide(tested: BehaviourVerdict, seeds: int, agreeing: int) -> tuple[Gated, str]:
    """Return the overall answer, power left aside, and the sentence that decides it.

    Args:
      tested: the answers of the tested dictionary.
      seeds: number of dictionaries that differ in their seed, the tested one included.
      agreeing: those of them in which questions 1 to 3 are answered yes.
    """
    first, second = _effect(tested), tested.random
    third, fourth = tested.placebo, tested.trained
    # A no decides, whatever could not be tested beside it; of questions 1 and 2 both must be testable.
    for question in (first, second):
        if question.answer not in ("yes", "no"):
            return "cannot tell", question.sentence
    for question in (first, second):
        if question.answer == "no":
            return "no signal", question.sentence
    if third.answer == "no":
        return "not specific", third.sentence
    if fourth.answer == "no":
        return "no better than untrained", fourth.sentence
    for question in (third, fourth):
        if question.answer != "yes":
            return "cannot tell", question.sentence
    if seeds < SEEDS:
        return "cannot tell", f"The answers hold, but {seeds} of {SEEDS} dictionaries of different seeds were tested."
    stable = 3 * agreeing >= 2 * seeds
    return (
        "interpretable" if stable else "unstable",
        f"Questions 1 to 3 are answered yes in {agreeing} of {seeds} dictionaries, question 4 in the tested one.",
    )


def items_needed(effect: Interval | None, items: int, smallest: float) -> int | None:
    """Return how many items would find an effect in ``POWER`` of cases, by the width of a measured interval.

    Args:
      effect: a mean and its 95 % interval over ``items``.
      items: how many there are.
      smallest: the effect to find; the unit of ``effect``.
    """
    if effect is None or smallest <= 0:
        return None
    sigmas = 1 + ndtri(POWER) / ndtri(0.975)  # the effect in half-widths of the interval
    return math.ceil(items * (sigmas * (effect.high - effect.low) / 2 / smallest) ** 2)


def _effect(answers: BehaviourVerdict) -> CausalAnswer:
    """Return the first answer to question 1: of the log-likelihood, or the logit difference."""
    return next(iter(answers.ablation.values()))


def criteria(figures: StudyFigures, rows: Sequence[Findings]) -> list[CriterionFigures]:
    """Return every criterion, met or not, with its evidence.

    Args:
      figures: all figures but the criteria.
      rows: the findings of each row.
    """
    units, done = sum(model.units for model in figures.models), sum(model.done for model in figures.models)
    finished = CriterionFigures("Every unit is done", done == units, f"{done} of {units}")
    return [finished, *_dictionaries(figures), *_causal(figures, rows), *_between(figures)]


def _criterion(text: str, answers: Sequence[bool], counted: str, more: str = "") -> CriterionFigures:
    """Return a criterion that is met where all answers are yes, and that cannot be asked without an answer."""
    return CriterionFigures(
        text, all(answers) if answers else None, f"{sum(answers)} of {len(answers)} {counted}{more}"
    )


def _range(shares: Sequence[float], text: str, show: Callable[[float], str]) -> str:
    """Return the smallest and the largest value in words, after a semicolon; "" without any."""
    return f"; {text}{show(min(shares))} to {show(max(shares))}" if shares else ""


def _dictionaries(figures: StudyFigures) -> Iterator[CriterionFigures]:
    falls = [scores.improvement for scores in figures.dictionaries if scores.improvement is not None]
    seconds = {(scores.row, scores.dictionary.split("/")[0]): scores.seconds for scores in figures.dictionaries}
    fell = _range(falls, "improvement ", _percent)
    fell += f"; trained in {number(sum(seconds.values()), 0)} s" if falls else ""
    text = f"Loss is lower in the last epoch than in epoch {EPOCH}"
    yield _criterion(text, [fall > 0 for fall in falls], "dictionaries", fell)
    recovered = [scores.ce_recovered for scores in figures.dictionaries if scores.ce_recovered is not None]
    text, kept = f"Dictionaries recover {FAITHFUL:g} of the cross-entropy", [share >= FAITHFUL for share in recovered]
    yield _criterion(text, kept, "dictionaries", _range(recovered, "", lambda share: number(share, 3)))


def _causal(figures: StudyFigures, rows: Sequence[Findings]) -> Iterator[CriterionFigures]:
    measured = [effect for effect in figures.effects if effect.accuracy_drop is not None]
    falls = _any_by_row((effect.row, effect.effect == effect.effect_resampled == "yes") for effect in measured)
    chance = sorted(f"{effect.row} on {effect.benchmark}" for effect in figures.effects if effect.at_chance)
    more = f"; at chance before any edit: {', '.join(chance)}" if chance else ""
    text = "Accuracy falls for both replacements on a benchmark of every row"
    yield _criterion(text, falls, "rows whose accuracy was measured", more)
    answers = [(effect.row, {effect.random, effect.placebo, effect.trained}) for effect in figures.effects]
    specific = _any_by_row((row, some == {"yes"}) for row, some in answers if "no" in some or some == {"yes"})
    text = "Top features do more than random sets, placebo sets and untrained dictionaries on a benchmark of every row"
    yield _criterion(text, specific, "rows with enough control sets")
    each = [results.importance or {} for row in rows for results in row.each(AblateResults).values()]
    shares = [effect.significant / effect.features for some in each for effect in some.values() if effect.features]
    evidence = "no stage measured single features (--ablate.effects=all)"
    if shares:
        evidence = f"{_range(shares, '', _percent)[2:]} of the features that fire on a behaviour"
    half = [share >= 0.5 for share in shares]
    text = "Half of the features that fire have an effect of their own"
    yield dataclasses.replace(_criterion(text, half, ""), evidence=evidence)


def _any_by_row(answers: Iterable[tuple[str, bool]]) -> list[bool]:
    """Return for each row, or dictionary, whether one of its answers is yes."""
    by_row: dict[str, bool] = {}
    for row, answer in answers:
        by_row[row] = by_row.get(row, False) or answer
    return list(by_row.values())


def _between(figures: StudyFigures) -> Iterator[CriterionFigures]:
    """Yield what is said of rows, layers and texts together."""
    aligned = [comparison.aligned for comparison in figures.alignment if comparison.aligned is not None]
    yield _criterion("Rows agree on what matters", aligned, "comparisons")
    pairs, text = figures.transfer, "Every dictionary shares features with another"
    shared = _range([pair.shared.mean for pair in pairs], "shared ", _percent)
    null = _percent(max((pair.shared_null.mean for pair in pairs), default=0.0))
    # With any other: distant layers of a deep model share little, which is no fault of theirs.
    above = _any_by_row(
        (f"{pair.row}/{name}", pair.shared.low > pair.shared_null.high)
        for pair in pairs
        for name in (pair.first, pair.second)
    )
    compared = _criterion(text, above, "dictionaries", f"{shared}, by chance at most {null}")
    yield compared if pairs else CriterionFigures(text, None, "not run")
    holding, chains = (sum(getattr(text, name) for text in figures.tracking) for name in ("holding", "measured"))
    followed = "no chain was measured" if figures.tracking else "not run"
    if chains:
        followed = f"{holding} of {chains} measured chains hold"
    text = "Chains of features through the layers hold"
    yield CriterionFigures(text, holding / chains >= 0.5 if chains else None, followed)
    tests, hurt = (sum(getattr(text, name) for text in figures.tracking if text.tests) for name in ("tests", "hurt"))
    followed = "no step of the texts has enough random sets" if figures.tracking else "not run"
    if tests:
        followed = f"{hurt} of {tests} steps with enough random sets are hurt"
    text = "Ablating a step's features at one layer hurts the step"
    yield CriterionFigures(text, hurt / tests >= 0.5 if tests else None, followed)


def _percent(share: float) -> str:
    return percent(share, 1)
