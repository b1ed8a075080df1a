"""Results of the stage ``report``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ReportResults:
    """The written report."""

    verdicts: Mapping[str, bool]  #: by behaviour
    figures: tuple[str, ...]  #: names of all
    contexts: Mapping[int, int]  #: feature -> how many contexts are shown
    html_bytes: int  #: of the page
