"""The report on sets of features: how the effect grows with the set, and whether the set is a circuit."""

from collections.abc import Mapping
from typing import Any

from saejax.reporting import figures
from saejax.reporting.document import Block, Picture, Section
from saejax.reporting.findings import Findings
from saejax.reporting.sections import Draw, behaviour
from saejax.reporting.tables import MISSING, Table, interval, number, percent

_WORDS = {  # of a null hypothesis that is rejected, and of one that is kept
    "equivalence": ("not equivalent", "not refuted"),
    "independence": ("depends", "not refuted"),
    "minimality": ("minimal", "not shown"),
    "sufficiency": ("sufficient", "not shown"),
    "necessity": ("necessary", "not shown"),
}


def feature_sets(found: Findings, draw: Draw) -> list[Section]:
    """The cumulative curves, greedy sets and tests of circuits; no section if nothing of it was measured."""
    curves, grown, tested = (_measured(found, kind) for kind in ("curve", "greedy", "circuit"))
    blocks: list[Block] = []
    if curves:
        blocks.append(_curves(curves, draw))
    if grown:
        blocks.append(_greedy_table(grown))
    if tested:
        blocks.append(_circuit_table(tested))
    return [Section("Sets of features", tuple(blocks))] if blocks else []


def _measured(found: Findings, kind: str) -> dict[str, Mapping[str, Any]]:
    """Title of the behaviour -> what was measured of this kind."""
    results = found.ablate["behaviours"]
    return {behaviour(name): result[kind] for name, result in results.items() if kind in result}


def _curves(curves: Mapping[str, Mapping], draw: Draw) -> Picture:
    caption = (
        "The logit difference that is left when the first 1, 2, 3, ... top features are removed together, and when as "
        "many random features are, matched to them one by one. Bands: 95 % bootstrap intervals over prompts."
    )
    alt = "Logit difference left. " + " ".join(
        f"{name}: without {curve['top']['sizes'][-1]} top features {interval(curve['top']['logit_diff'][-1])}, "
        f"without as many random ones {interval(curve['controls']['logit_diff'][-1])}."
        for name, curve in curves.items()
    )
    return draw("cumulative", figures.cumulative(curves), caption, alt)


def _greedy_table(grown: Mapping[str, Mapping]) -> Table:
    rows = tuple(
        (
            name,
            str(len(set_["features"])),
            *(interval(set_[key][-1]) for key in ("greedy_drop", "top_drop", "difference")),
        )
        if set_["features"]
        else (name, "0", MISSING, MISSING, MISSING)
        for name, set_ in grown.items()
    )
    note = (
        "A set grown step by step on train prompts, each time by the feature whose removal with the set costs most, "
        "beside as many top features by attribution. Logit difference lost on the test prompts, with 95 % intervals; "
        "the difference is paired by prompt."
    )
    columns = ("Behaviour", "Features", "Greedy set", "Top features", "Difference")
    return Table("Sets grown on train prompts", columns, rows, note=note)


def _circuit_table(tested: Mapping[str, Mapping]) -> Table:
    rows = tuple(
        (
            name,
            *(_cell(kind, circuit["tests"][kind]) for kind in _WORDS),
            " / ".join(number(circuit[key]) for key in ("clean", "kept", "removed")),
        )
        for name, circuit in tested.items()
    )
    note = (
        "Hypothesis tests of the top features as a circuit (Shi et al., 2024). Alone: all other features that fire "
        "are removed. Equivalent: alone the set does better than the model as often as worse. Independent: what is "
        "left without the set does not depend on the model's score. Minimal: every feature matters more than a random "
        "one (share of those that do). Sufficient, necessary: the set beats matched random sets, kept or removed "
        "(share of those beaten). In brackets p-values after Holm's correction for five tests; not refuted does not "
        "mean true. Last column: mean logit difference of the model, of the set alone, without the set."
    )
    columns = ("Behaviour", "Equivalent", "Independent", "Minimal", "Sufficient", "Necessary", "Clean / kept / removed")
    return Table("The top features as a circuit", columns, rows, frozenset(range(1, 6)), stack=True, note=note)


def _cell(kind: str, outcome: Mapping[str, Any]) -> str:
    if outcome["p_holm"] is None:
        return MISSING
    share = f"{percent(outcome['statistic'])}, " if kind in ("minimality", "sufficiency", "necessity") else ""
    p = "< 0.001" if outcome["p_holm"] < 0.001 else f"= {number(outcome['p_holm'], 3)}"
    return f"{_WORDS[kind][not outcome['rejected']]} ({share}p {p})"
