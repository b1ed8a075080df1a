"""A feature as rows of Neuronpedia's database.

The keys of rows are columns (``apps/webapp/prisma/schema.prisma`` of hijohnnylin/neuronpedia). Groups of contexts are
tenths of a feature's firings by activation; ``binContains`` is the share of all tokens in one. Columns about a model's
neurons, and about text that is not kept, are left at their defaults.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from saejax.dictionaries.labels import Label
from saejax.interpret.feature_record import FeatureContext, FeatureRecord, LogitHistogram
from saejax.interpret.records import GROUPS, LOWEST, PER_OCTAVE

CREATOR_ID = "clkht01d40000jv08hvalcvly"  # the account that imported bundles belong to, as other writers give it
_ALIGNED = 3  # coordinates of the stream that a feature writes to most
_LONGEST = 512  # characters of an explanation, at most


@dataclasses.dataclass(frozen=True)
class NeuronpediaSource:
    """A dictionary at Neuronpedia."""

    model: str  #: its id there
    set: str  #: name of the set of sources, such as "res-topk"
    layer: int  #: of the site that the dictionary reads
    hook: str | None  #: TransformerLens' name of the site that it writes to; None where there is none

    @property
    def id(self) -> str:
        """The source's name, such as "15-res-topk"."""
        return f"{self.layer}-{self.set}"

    def key(self, feature: int) -> dict[str, str]:
        """Return the columns that name a feature."""
        return dict(modelId=self.model, layer=self.id, index=str(feature))

    def row_id(self, *parts: Any) -> str:
        """Return a name of a row, as long as those that the database gives; the same in every run."""
        return "c" + hashlib.sha256("/".join(map(str, (self.model, self.id, *parts))).encode()).hexdigest()[:24]


def feature_row(source: NeuronpediaSource, record: FeatureRecord, row_D: np.ndarray) -> dict[str, Any]:
    """Return a row of features.

    Args:
      source: which set of features it belongs to.
      record: as the stage ``interpret`` writes it.
      row_D: its decoder row.
    """
    aligned, length = np.argsort(-row_D, kind="stable")[:_ALIGNED], max(float(np.abs(row_D).sum()), 1e-30)
    bins = [(i, count) for i, count in enumerate(record.get("histogram", ())) if count]
    logits = record.get("logits") or LogitHistogram(low=0.0, high=0.0, counts=[])
    edges = np.linspace(logits["low"], logits["high"], len(logits["counts"]) + 1)
    return source.key(record["feature"]) | dict(
        creatorId=CREATOR_ID,
        sourceSetName=source.set,
        maxActApprox=record.get("max", 0.0),
        frac_nonzero=record["rate"],
        pos_str=[text for text, _ in record.get("up", ())],
        pos_values=[value for _, value in record.get("up", ())],
        neg_str=[text for text, _ in record.get("down", ())],
        neg_values=[value for _, value in record.get("down", ())],
        freq_hist_data_bar_heights=[count for _, count in bins],
        freq_hist_data_bar_values=[float(f"{2 ** ((i + 0.5) / PER_OCTAVE + LOWEST):.4g}") for i, _ in bins],
        logits_hist_data_bar_heights=logits["counts"],
        logits_hist_data_bar_values=_rounded((edges[1:] + edges[:-1]) / 2),
        neuron_alignment_indices=aligned.tolist(),
        neuron_alignment_values=_rounded(row_D[aligned]),
        neuron_alignment_l1=_rounded(row_D[aligned] / length),
        topkCosSimIndices=[neighbour for neighbour, _ in record["nearest"]],
        topkCosSimValues=[cosine for _, cosine in record["nearest"]],
        hasVector=True,
        vector=_rounded(row_D),
        vectorDefaultSteerStrength=record.get("max", 0.0),
        hookName=source.hook,
    )


def activation_rows(source: NeuronpediaSource, record: FeatureRecord) -> Iterator[dict[str, Any]]:
    """Return the rows of a feature's contexts: the strongest, then those of its groups; none if it never fires."""
    for number, context in enumerate([*record.get("examples", ()), *record.get("groups", ())]):
        values, group = _acts(context), context.get("group")
        if group is None:
            bounds = dict(binMin=-1.0, binMax=record["max"], binContains=-1.0)  # so the strongest are marked
        else:
            low, high = record["tenths"][group : group + 2]
            bounds = dict(binMin=low, binMax=high, binContains=record["rate"] / GROUPS)
        yield (
            source.key(record["feature"])
            | bounds
            | dict(
                id=source.row_id(record["feature"], number),
                tokens=context["tokens"],
                values=values,
                maxValue=max(values),
                maxValueTokenIndex=int(np.argmax(values)),
                minValue=min(values),
                qualifyingTokenIndex=context["peak"],
                dataIndex=str(context["document"]),
                creatorId=CREATOR_ID,
            )
        )


def explanation_row(source: NeuronpediaSource, feature: int, label: Label) -> dict[str, Any]:
    """Return the row of a feature's label. Who gave it is a note: columns for that take registered names alone."""
    score = "" if label.f1 is None else f", F1 {label.f1:.2f} on held-out text"
    return source.key(feature) | dict(
        id=source.row_id(feature, "label"),
        description=label.label[:_LONGEST],
        authorId=CREATOR_ID,
        notes=f"by {label.by}{score}" + (f": {label.note}" if label.note else ""),
    )


def _acts(context: FeatureContext) -> list[float]:
    """Return the activations of a context, 0 where the store has none."""
    return [act or 0.0 for act in context["acts"]]


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values, 6).tolist()
