"""Results of the stage ``report``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ReportResults:
    """The written report."""

    specific: Mapping[str, str]  #: by behaviour, whether the top features are specific to its answer (question 3)
    figures: tuple[str, ...]  #: names of all figures
    contexts: Mapping[int, int]  #: number of contexts shown for each feature
    html_bytes: int  #: size of the page
