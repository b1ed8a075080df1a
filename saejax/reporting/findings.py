"""What a report reports: the results of the stages, gathered from the files of their units."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.analysis.examples import Example
from saejax.errors import UserError
from saejax.workspace import SUMMARY, read_json

_CURVES = ("tokens", "explained_variance", "l0")
_POINTS = 400  # of a training curve; a longer one is thinned, its ends kept


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of the stages that a report reads.

    Attributes:
      summaries: unit -> its summary.
      own: the report's own settings.
      curves: dictionary -> {"tokens", "explained_variance", "l0"}, lists of equal length.
      firing_rate_F: of the tested dictionary, on held-out text.
      mean_activation_F: the same; over the tokens where the feature fires.
      examples: feature of the tested dictionary -> its strongest contexts.
    """

    summaries: Mapping[str, Mapping[str, Any]]
    own: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Mapping[str, Sequence[float]]]
    firing_rate_F: np.ndarray
    mean_activation_F: np.ndarray
    examples: Mapping[int, Sequence[Example]] = dataclasses.field(default_factory=dict)

    @property
    def behaviours(self) -> Mapping[str, Any]:
        """Baseline results by behaviour."""
        return self.summaries["baseline"]["results"]["behaviours"]

    @property
    def ablate(self) -> Mapping[str, Any]:
        """Results of the causal tests."""
        return next(summary for unit, summary in self.summaries.items() if unit.split("/")[0] == "ablate")["results"]

    def named(self, stage: str) -> dict[str, Mapping[str, Any]]:
        """Results of a stage that has a unit per dictionary, by dictionary."""
        units = (unit.partition("/") for unit in self.summaries)
        return {name: self.summaries[f"{stage}/{name}"]["results"] for part, _, name in units if part == stage and name}

    def settings(self) -> dict[str, dict[str, Any]]:
        """The resolved configuration of all the units together: group -> field -> value."""
        groups: dict[str, dict[str, Any]] = {}
        for summary in self.summaries.values():
            groups |= summary["config"]
        return groups | {group: dict(fields) for group, fields in self.own.items()}


def read_findings(inputs: Mapping[str, Path], own: Mapping[str, Mapping[str, Any]]) -> Findings:
    """Reads the units' files.

    Args:
      inputs: unit -> folder: "baseline", "benchmark/NAME", "capture", "train/NAME", "evaluate/NAME" and "ablate" or
        "ablate/NAME".
      own: the report's own settings, group -> field -> value.

    Raises:
      UserError: a file is missing or damaged.
    """
    summaries = {unit: read_json(folder / SUMMARY) for unit, folder in inputs.items()}
    curves = {
        unit.partition("/")[2]: _curve(folder / "metrics.jsonl")
        for unit, folder in inputs.items()
        if unit.startswith("train/")
    }
    findings = Findings(summaries, own, curves, np.zeros(0), np.zeros(0))
    tested = inputs[f"evaluate/{findings.ablate['dictionary']}"]
    return dataclasses.replace(
        findings,
        firing_rate_F=_array(tested / "firing_rate.npy"),
        mean_activation_F=_array(tested / "mean_activation.npy"),
    )


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"{path} is missing or damaged: delete {path.parent} and run the evaluate stage again"
        ) from None


def _curve(path: Path) -> dict[str, list[float]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = {key: [float(line[key]) for line in lines] for key in _CURVES}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is missing or damaged: expected one JSON object with {', '.join(_CURVES)} per line; "
            f"delete {path.parent} and run the train stage again"
        ) from None
    keep = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), _POINTS)).round().astype(int))
    return {key: [column[i] for i in keep] for key, column in values.items()}
