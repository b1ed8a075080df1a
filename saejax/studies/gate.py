"""The overall answer (gate) of a row on a benchmark, a rule that is written down before any row runs.

It is about log-likelihoods, which every model has, however weak. "Interpretable" takes a yes against every control:
random sets, placebo sets, untrained dictionaries and dictionaries of other seeds. Beside it stands how many placebo
sets also do more than random sets.
"""

import math
from collections.abc import Sequence

from scipy.special import ndtri

from saejax.interventions.answers import BehaviourVerdict, CausalAnswer
from saejax.page.tables import number
from saejax.results import Interval
from saejax.studies import alignment
from saejax.studies.results import Gated, GateFigures

LEVEL = 0.05  # of the overall answer, for each row and benchmark
SMALLEST = 0.5  # standard deviations of the log-likelihood between items: the smallest effect of interest
POWER, SEEDS = 0.8, 3  # of finding it; dictionaries, the tested one included
#: The controls of questions 2 to 4, in words.
_CONTROLS = dict(random="random sets", placebo="placebo sets", trained="untrained dictionaries")
GATE = (
    "A row on a benchmark gets the first answer that holds. Cannot tell: whether ablation has an effect (1) is not "
    "testable, or it has no effect but one of "
    f"{SMALLEST:g} standard deviations of the log-likelihood between items would have been found in fewer than "
    f"{100 * POWER:g} % of cases. No signal: question 1 or 2 is answered no. Not specific: question 3, against placebo "
    "sets, is answered no. No better than untrained: question 4, against untrained dictionaries, is answered no. "
    "Cannot tell: one of questions 2 to 4 is not testable or was not tested, or fewer than "
    f"{SEEDS} dictionaries that differ in their seed were tested, or those of them in which questions 1 to 3 are not "
    "testable would decide what follows. Interpretable: questions 1 to 3 are answered yes in at least two of three of "
    "these, and all four in the tested one. Unstable: everything else."
)
RULES = dict(gate=GATE, alignment=alignment.RULE)


def overall_answer(
    row: str, benchmark: str, answers: Sequence[BehaviourVerdict], items: int, spread: float
) -> GateFigures:
    """Return the overall answer for a row on a benchmark, a function of the verdict's answers alone.

    Args:
      row: its name.
      benchmark: its name.
      answers: of the tested dictionary, then of dictionaries of other seeds.
      items: of the benchmark that judged.
      spread: standard deviation of the reference answers' log-likelihood between these, without an edit, nats.
    """
    tested = answers[0]
    smallest = SMALLEST * spread
    needed = items_needed(_effect(tested).effect, items, smallest)
    holds = [[_effect(verdict).answer, verdict.random.answer, verdict.placebo.answer] for verdict in answers]
    agreeing = sum(three == ["yes"] * 3 for three in holds)
    untold = sum("no" not in three for three in holds) - agreeing
    answer, reason = _decide(tested, len(answers), agreeing, untold)
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


def _decide(tested: BehaviourVerdict, seeds: int, agreeing: int, untold: int) -> tuple[Gated, str]:
    """Return the overall answer, power left aside, and the sentence that decides it.

    Args:
      tested: the answers of the tested dictionary.
      seeds: number of dictionaries that differ in their seed, the tested one included.
      agreeing: dictionaries of them in which questions 1 to 3 are answered yes.
      untold: dictionaries of them in which none is answered no, but not all of them yes.
    """
    first, second = _effect(tested), tested.random
    third, fourth = tested.placebo, tested.trained
    if first.answer not in ("yes", "no"):
        return "cannot tell", first.sentence
    # A no decides, whatever could not be tested beside it.
    noes: tuple[tuple[CausalAnswer, Gated], ...] = (
        (first, "no signal"),
        (second, "no signal"),
        (third, "not specific"),
        (fourth, "no better than untrained"),
    )
    for question, meaning in noes:
        if question.answer == "no":
            return meaning, question.sentence
    for question in (second, third, fourth):
        if question.answer != "yes":
            return "cannot tell", question.sentence
    if seeds < SEEDS:
        return "cannot tell", f"The answers hold, but {seeds} of {SEEDS} dictionaries of different seeds were tested."
    text = f"Questions 1 to 3 are answered yes in {agreeing} of {seeds} dictionaries"
    if 3 * agreeing >= 2 * seeds:
        return "interpretable", f"{text}, question 4 in the tested one."
    if 3 * (agreeing + untold) >= 2 * seeds:
        return "cannot tell", f"{text}, and in {untold} not all of them are testable."
    return "unstable", f"{text}, question 4 in the tested one."


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
