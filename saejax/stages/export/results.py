"""Results of the stage ``export``."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExportedMember:
    """A dictionary in the other format."""

    name: str  #: as trained
    site: str  #: as trained
    target: str  #: as trained
    folder: str  #: folder with its files


@dataclasses.dataclass(frozen=True)
class ExportResults:
    """A train unit in the format of another tool."""

    format: str  #: format of the files
    members: tuple[ExportedMember, ...]  #: exported dictionaries, each with its folder
