"""Sheets for people who read a behaviour's top features: ``review/BEHAVIOUR.csv``, one line for each feature.

A sheet holds what a reader needs (effect, firing rate, automatic label, strongest contexts) and the empty columns
label, note and reviewer. A filled copy is a file of labels, as ``--atlas.labels`` takes it; the report then says how
many of a behaviour's top features were reviewed, and all pages use their names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from saejax.dictionaries.labels import Label
from saejax.dictionaries.names import folder_name
from saejax.interpret.feature_record import FeatureContext, FeatureRecord, top_tokens
from saejax.interpret.labels import write_sheet
from saejax.interpret.results import ReviewedFeatures
from saejax.interventions.answers import FeatureEffect

CONTEXTS = 3  # of the strongest, in columns of their own
_AROUND = 12  # tokens shown on each side of the strongest


def write_sheets(
    folder: Path,
    dictionary: str,
    top: Mapping[str, Sequence[FeatureEffect]],
    records: Mapping[int, FeatureRecord],
    automatic: Mapping[int, Label],
    by_hand: Mapping[int, Label],
) -> tuple[ReviewedFeatures, ...]:
    """Write a sheet for each behaviour, and count the features that have a label by hand.

    Args:
      folder: for the sheets.
      dictionary: name of the dictionary.
      top: behaviour -> its top features, with the effect of ablating each.
      records: of these features.
      automatic: labels by a rule or a language model, by feature.
      by_hand: labels by people, by feature.
    """
    counts = []
    for behaviour, effects in top.items():
        rows = []
        for effect in effects:
            feature, record = effect.feature, records[effect.feature]
            label, automatic_label = by_hand.get(feature, Label("", "")), automatic.get(feature)
            contexts = [_one_line(context) for context in record.get("examples", [])[:CONTEXTS]]
            rows.append(
                dict(
                    feature=feature,
                    label=label.label,
                    note=label.note,
                    reviewer=label.by,
                    dictionary=dictionary,
                    logits_lost=f"{effect.drop.mean:.3f}",
                    firing_rate=f"{effect.firing_rate:.4f}",
                    automatic_label=f"{automatic_label.label} (by {automatic_label.by})" if automatic_label else "",
                    top_tokens=top_tokens(record),
                    **{f"context_{n + 1}": contexts[n] if n < len(contexts) else "" for n in range(CONTEXTS)},
                )
            )
        if rows:
            write_sheet(folder / f"{folder_name(behaviour)}.csv", rows, list(rows[0]))
            counts.append(ReviewedFeatures(behaviour, sum(row["feature"] in by_hand for row in rows), len(rows)))
    return tuple(counts)


def _one_line(context: FeatureContext) -> str:
    """Return a context on one line, with the strongest token in double brackets."""
    peak = context["peak"]
    pieces = [f"[[{token}]]" if n == peak else token for n, token in enumerate(context["tokens"])]
    line = "".join(pieces[max(peak - _AROUND, 0) : peak + _AROUND + 1]).encode("utf-8", "replace").decode()
    return " ".join(line.split())
