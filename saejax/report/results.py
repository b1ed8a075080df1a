"""Results of the stage ``report``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ReportResults:
    """The written report.

    Attributes:
      verdicts: by behaviour.
      figures: names of all.
      contexts: feature -> how many contexts are shown.
      html_bytes: of the page.
    """

    verdicts: Mapping[str, bool]
    figures: tuple[str, ...]
    contexts: Mapping[int, int]
    html_bytes: int
