"""The input of a report: summaries of units, with the results of each as its stage's class."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from matplotlib.figure import Figure

from saejax.page.blocks import Picture
from saejax.page.strips import Example
from saejax.results import Settings, Summary, load_summary

T = TypeVar("T")
Draw = Callable[[str, Figure, str, str], Picture]  # name, figure, caption, alt


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results and settings that the sections of a report are written from.

    Attributes:
      summaries: unit -> its summary.
      folders: unit -> its folder, for what is shown as it lies there.
      report: the report's own folder.
      own: the report's own settings, group -> field -> value.
      examples: feature of the tested dictionary -> its strongest contexts.
    """

    summaries: Mapping[str, Summary]
    folders: Mapping[str, Path]
    report: Path
    own: Settings
    examples: Mapping[int, Sequence[Example]] = dataclasses.field(default_factory=dict)

    def each(self, results: type[T]) -> dict[str, T]:
        """Name of the unit -> its results, of all units whose results are of a class."""
        found = ((unit, summary.results) for unit, summary in self.summaries.items())
        return {unit.partition("/")[2]: own for unit, own in found if isinstance(own, results)}

    def one(self, results: type[T]) -> T:
        """Return the results of the first unit of a class, which there must be."""
        return next(iter(self.each(results).values()))

    def with_results(self, results: object) -> "Findings":
        """Return the same with other results of the one unit whose results are of their class."""
        units = {
            unit: dataclasses.replace(summary, results=results)
            if isinstance(summary.results, type(results))
            else summary
            for unit, summary in self.summaries.items()
        }
        return dataclasses.replace(self, summaries=units)

    def address(self, file: Path) -> str:
        """Return a file as the report links to it."""
        return quote(os.path.relpath(file, self.report).replace(os.sep, "/"))

    def settings(self) -> Settings:
        """Return the resolved configuration of all the units together: group -> field -> value."""
        groups = [summary.config for summary in self.summaries.values()]
        return {group: fields for some in (*groups, self.own) for group, fields in some.items()}


def read_findings(inputs: Mapping[str, Path], report: Path, own: Settings) -> Findings:
    """Read the summaries of units.

    Args:
      inputs: unit -> folder.
      report: the report's own folder.
      own: its settings, group -> field -> value.

    Raises:
      UserError: a summary is missing or damaged.
    """
    return Findings({unit: load_summary(folder) for unit, folder in inputs.items()}, inputs, report, own)
