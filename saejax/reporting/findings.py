"""What a report reports: the results of the stages, gathered from the files of their units."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.analysis.examples import Example
from saejax.causal.ablate.importance import Importance, importance_file
from saejax.causal.patching.cells import Cells, cells_file
from saejax.dictionaries import stacks
from saejax.errors import UserError
from saejax.workspace import SUMMARY, read_json

_CURVES = ("tokens", "explained_variance", "l0")
Curve = Mapping[str, Sequence[float]]
_POINTS = 400  # of a training curve; a longer one is thinned, its ends kept


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of the stages that a report reads.

    Attributes:
      summaries: unit -> its summary.
      own: the report's own settings.
      curves: kind -> for each of its members {"tokens", "explained_variance", "l0"}, lists of equal length.
      firing_rate_F: of the tested dictionary, on held-out text.
      mean_activation_F: the same; over the tokens where the feature fires.
      importance: behaviour -> the effects of all features, where they were measured.
      cells: kind of site that was patched -> behaviour -> what patching it does.
      examples: feature of the tested dictionary -> its strongest contexts.
      folders: unit -> its folder, for what is shown as it lies there.
    """

    summaries: Mapping[str, Mapping[str, Any]]
    own: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Sequence[Curve]]
    firing_rate_F: np.ndarray
    mean_activation_F: np.ndarray
    importance: Mapping[str, Importance] = dataclasses.field(default_factory=dict)
    cells: Mapping[str, Mapping[str, Cells]] = dataclasses.field(default_factory=dict)
    examples: Mapping[int, Sequence[Example]] = dataclasses.field(default_factory=dict)
    folders: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def behaviours(self) -> Mapping[str, Any]:
        """Baseline results by behaviour."""
        return self.summaries["baseline"]["results"]["behaviours"]

    @property
    def ablate(self) -> Mapping[str, Any]:
        """Results of the causal tests."""
        return next(summary for unit, summary in self.summaries.items() if unit.split("/")[0] == "ablate")["results"]

    @property
    def scores(self) -> dict[str, list[Mapping[str, Any]]]:
        """Held-out scores of the members of each kind."""
        return {kind: results["members"] for kind, results in self._units("evaluate").items()}

    @property
    def tested(self) -> Mapping[str, Any]:
        """Held-out scores of the dictionary that was tested causally."""
        kind, member = stacks.kind_and_member(self.ablate["dictionary"])
        return next(entry for entry in self.scores[kind] if entry["name"] == member)

    @property
    def trained(self) -> dict[str, Mapping[str, Any]]:
        """Results of training each kind."""
        return self._units("train")

    @property
    def benchmarks(self) -> dict[str, Mapping[str, Any]]:
        """Results of each benchmark."""
        return self._units("benchmark")

    @property
    def probes(self) -> dict[str, Mapping[str, Any]]:
        """Results of the linear probes, if any."""
        return self._units("probe")

    @property
    def studies(self) -> dict[str, Mapping[str, Any]]:
        """What removing features does to each benchmark, if asked for."""
        return self._units("study")

    @property
    def graphs(self) -> dict[str, Mapping[str, Any]]:
        """Attribution graphs by unit, if any."""
        return self._units("attribute")

    @property
    def has_stacks(self) -> bool:
        """Whether a kind has more than one member."""
        return any(len(members) > 1 for members in self.scores.values())

    def _units(self, stage: str) -> dict[str, Mapping[str, Any]]:
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
      inputs: unit -> folder: "baseline", "benchmark/NAME", "capture", "train/KIND", "evaluate/KIND", "ablate" or
        "ablate/NAME", and perhaps "probe/NAME", "patch/NAME", "study/NAME" and "attribute/NAME".
      own: the report's own settings, group -> field -> value.

    Raises:
      UserError: a file is missing or damaged.
    """
    summaries = {unit: read_json(folder / SUMMARY) for unit, folder in inputs.items()}
    curves = {
        unit.partition("/")[2]: _curves(folder / "metrics.jsonl")
        for unit, folder in inputs.items()
        if unit.startswith("train/")
    }
    findings = Findings(summaries, own, curves, np.zeros(0), np.zeros(0))
    kind, member = stacks.kind_and_member(findings.ablate["dictionary"])
    tested = inputs[f"evaluate/{kind}"] / member
    ablated = next(folder for unit, folder in inputs.items() if unit.split("/")[0] == "ablate")
    measured = [name for name, result in findings.ablate["behaviours"].items() if "importance" in result]
    return dataclasses.replace(
        findings,
        importance={name: Importance.load(importance_file(ablated, name)) for name in measured},
        cells={
            unit.partition("/")[2]: {
                name: Cells.load(cells_file(inputs[unit], name)) for name in summary["results"]["behaviours"]
            }
            for unit, summary in summaries.items()
            if unit.startswith("patch/") and "kind" in summary["results"]
        },
        folders=inputs,
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


def _curves(path: Path) -> list[Curve]:
    """The training curve of every member."""
    points: dict[str, list[list[float]]] = {}
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            points.setdefault(line["member"], []).append([float(line[key]) for key in _CURVES])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is missing or damaged: expected one JSON object with member, {', '.join(_CURVES)} per line; "
            f"delete {path.parent} and run the train stage again"
        ) from None
    return [_thinned(own) for own in points.values()]


def _thinned(points: list[list[float]]) -> Curve:
    keep = np.unique(np.linspace(0, len(points) - 1, min(len(points), _POINTS)).round().astype(int))
    return {key: [points[i][column] for i in keep] for column, key in enumerate(_CURVES)}
