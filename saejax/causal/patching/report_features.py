"""The report on patched features: what they carry over, one by one and together."""

from collections.abc import Mapping

import numpy as np

from saejax.causal.patching.results import FeaturePatchResults, PatchedFeatures, PatchedSet
from saejax.dictionaries.labels import Label
from saejax.page.tables import MISSING, Table, interval, number
from saejax.page.words import behaviour
from saejax.results import Interval

_NAMED = 5  # features of each behaviour that are shown one by one


def tables(results: FeaturePatchResults, labels: Mapping[int, Label]) -> list[Table]:
    """What features carry over; ``labels``: what they are called, none if they were not interpreted."""
    made = [_features_table(results), _single_table(results, labels)]
    if any(one.disentangled for one in results.behaviours.values()):
        made.append(_disentangled_table(results))
    return made


def _single_table(results: FeaturePatchResults, labels: Mapping[int, Label]) -> Table:
    """The features that restore most, one by one."""
    rows = []
    for name, result in results.behaviours.items():
        ranked = sorted(result.features, key=lambda one: -one.denoising.effect.mean)[:_NAMED]
        for one in ranked:
            label = labels[one.feature].label if one.feature in labels else MISSING
            effects = (interval(one.denoising.effect), interval(one.noising.effect))
            rows.append((behaviour(name), str(one.feature), label, *effects))
    note = (
        f"The {_NAMED} features of each behaviour that alone restore most logit difference when they are carried from "
        "the prompt to its counterpart, and what is lost when they are carried the other way; logits, 95 % bootstrap "
        "intervals. They were chosen by the first of these figures, which is therefore too large. A label says where a "
        "feature fires."
    )
    columns = ("Behaviour", "Feature", "Label", "Restored", "Lost")
    return Table("Features patched one by one", columns, tuple(rows), frozenset({2}), note=note)


def _features_table(results: FeaturePatchResults) -> Table:
    sets = ("Top features", "As many random", "All features", "The error", "Whole site")
    columns = ("Behaviour", "Pairs", *(f"{name}, %" for name in sets), "Restored")
    rows = tuple(_features_row(name, result, results.top) for name, result in results.behaviours.items())
    templates = [result.templates for result in results.behaviours.values()]
    note = (
        f"Features of {results.dictionary} at {results.site} take the values they have on the counterpart: how "
        "often the answer becomes the counterpart's, of the pairs on which the model is right both times (interchange-"
        "intervention accuracy; Geiger et al., 2021). Random: sets drawn from features matched to the top ones and "
        f"themselves, the mean over {results.draws} draws, and p, the share of sets that carry as much over. The "
        "error: what the dictionary does not explain, alone. The whole site is the ceiling: all of its content at all "
        "positions, of which the others are "
        "parts; it says that the content passes here, not what carries it. Last column: the share of the logit "
        "difference that the top features restore when they are carried from the prompt to its counterpart. 95 % "
        "intervals: Wilson's of the shares of pairs, bootstrap of the others"
        + (", by template." if any(templates) else ".")
    )
    return Table(f"Interchange of the top {results.top} features", columns, rows, note=note)


def _disentangled_table(results: FeaturePatchResults) -> Table:
    """Cause and isolate of features, between a learned subspace and random ones."""
    rows = []
    for name, result in results.behaviours.items():
        for one in result.disentangled:
            stay = [share.mean for share in one.isolate.values()]
            score = MISSING
            if one.cause and stay:
                score = number(50 * (one.cause.mean + float(np.mean(stay))), 0)
            isolate = ", ".join(f"{behaviour(other)} {_share(share)}" for other, share in one.isolate.items())
            cause = _share(one.cause)
            rows.append((behaviour(name), one.method, str(one.size), cause, isolate or MISSING, score))
    note = (
        "Cause: the share of this behaviour's test pairs whose answer becomes the counterpart's when the counterpart's "
        "values are put in. Isolate: the share of another behaviour's pairs whose answer stays when the same is done "
        "with their counterparts; features that do not fire there leave it alone. Score: the mean of cause and of the "
        "mean isolate (RAVEL; Huang et al., 2024). DAS is a subspace of so many dimensions that was learned on train "
        "pairs for its cause alone: the line that features are read against. 95 % Wilson intervals."
    )
    columns = ("Behaviour", "What is put in", "Size", "Cause, %", "Isolate, %", "Score, %")
    return Table("Cause and isolate", columns, tuple(rows), frozenset({1, 4}), note=note)


def _features_row(name: str, result: PatchedFeatures, top: int) -> tuple[str, ...]:
    found = result.interchange
    restored = _restored(result.together)
    if not found.prompts:
        return (behaviour(name), "0", *5 * (MISSING,), restored)
    most = found.top[-1] if found.top else None
    own, random = (
        (_share(most.accuracy), f"{_share(most.random)}, p = {number(most.p_value, 3)}") if most else 2 * (MISSING,)
    )
    return (
        behaviour(name),
        str(found.prompts),
        own,
        random,
        *map(_share, (found.all, found.error, found.ceiling)),
        restored,
    )


def _restored(together: tuple[PatchedSet, ...]) -> str:
    tops = [entry for entry in together if entry.features != "all"]
    value = tops[-1].denoising.normalised if tops else None
    return interval(value)


def _share(value: Interval | None) -> str:
    return interval(value, 0, 100)
