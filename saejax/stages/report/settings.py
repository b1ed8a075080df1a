"""Settings of the report."""

import dataclasses

from saejax.config import Config, Text, setting


@dataclasses.dataclass(frozen=True)
class ReportConfig(Config):
    """The written report."""

    title: Text = setting("Which features cause these behaviours?", "title of the report")
