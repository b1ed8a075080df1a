"""Results of the stage ``report``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ReportResults:
    """The written report."""

    grades: Mapping[str, str]  #: by behaviour, the highest answer that holds; "none"
    figures: tuple[str, ...]  #: names of all
    contexts: Mapping[int, int]  #: feature -> how many contexts are shown
    html_bytes: int  #: of the page
