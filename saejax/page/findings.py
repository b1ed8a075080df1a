"""The input of a report: summaries of units, with the results of each as its stage's class."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from saejax.page.blocks import Picture
from saejax.page.strips import Example
from saejax.page.words import behaviour, mark_weak
from saejax.results import Settings
from saejax.runner.results import Summary, load_summary
from saejax.tasks.results import BaselineResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Draw = Callable[[str, "Figure", str, str], Picture]  # name, figure, caption, alt


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results and settings that the sections of a report are written from."""

    summaries: Mapping[str, Summary]  #: unit -> its summary
    folders: Mapping[str, Path]  #: unit -> its folder, for files that the report shows or links to as they are
    report: Path  #: folder of the report itself
    report_settings: Settings  #: settings of the report itself, group -> field -> value
    #: feature of the tested dictionary -> its strongest contexts.
    examples: Mapping[int, Sequence[Example]] = dataclasses.field(default_factory=dict)

    def select(self, results: type[T]) -> dict[str, T]:
        """Return the results of all units whose results are of a class, by the name of the unit after its stage."""
        results_by_unit = ((unit, summary.results) for unit, summary in self.summaries.items())
        return {
            unit.partition("/")[2]: unit_results
            for unit, unit_results in results_by_unit
            if isinstance(unit_results, results)
        }

    def first(self, results: type[T]) -> T:
        """Return the results of the first unit whose results are of a class; at least one unit must have them."""
        return next(iter(self.select(results).values()))

    def weak(self, names: Iterable[str]) -> dict[str, str]:
        """Return the weak points of those of some behaviours of which the model itself is unsure, in words."""
        every = {name: why for baseline in self.select(BaselineResults).values() for name, why in baseline.weak.items()}
        return {name: every[name] for name in names if name in every}

    def title(self, name: str) -> str:
        """Return a behaviour's title, marked where it is weak."""
        return mark_weak(behaviour(name), self.weak([name]))

    def address(self, file: Path) -> str:
        """Return a file's address for the report's links: relative to the report, percent-encoded."""
        return quote(os.path.relpath(file, self.report).replace(os.sep, "/"))

    def settings(self) -> Settings:
        """Return the settings of all units and of the report, group -> field -> value."""
        configs = [*(summary.config for summary in self.summaries.values()), self.report_settings]
        return {group: fields for config in configs for group, fields in config.items()}


def read_findings(inputs: Mapping[str, Path], report: Path, report_settings: Settings) -> Findings:
    """Read the summaries of units.

    Args:
      inputs: unit -> folder.
      report: folder of the report itself.
      report_settings: settings of the report itself, group -> field -> value.

    Raises:
      UserError: a summary is missing or damaged.
    """
    summaries = {unit: load_summary(folder) for unit, folder in inputs.items()}
    return Findings(summaries, inputs, report, report_settings)
