"""What features are called: the one place that pages ask. The stages ``interpret`` and ``atlas`` write it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from saejax.dictionaries.stacks import kind_and_member
from saejax.results import from_json
from saejax.workspace import read_json

LABELS = "labels.json"
FOUND = "detector"  # who gave a label that was found


@dataclasses.dataclass(frozen=True)
class Label:
    """What a feature is called."""

    label: str  #: in words
    by: str  #: who says so: "detector", or a reviewer's name
    note: str = ""  #: by the reviewer
    f1: float | None = None  #: of the detector on held-out text; None for a label by hand


def load_labels(path: Path) -> dict[int, Label]:
    """The labels in a file that a stage wrote, by feature.

    Raises:
      UserError: it is missing or damaged.
    """
    return dict(from_json(dict[int, Label], read_json(path), path))


def labels_of(workdir: Path | str, dictionary: str) -> Mapping[int, Label]:
    """What the features of a dictionary are called: those labelled by hand, then those whose label was found.

    Args:
      workdir: of the run.
      dictionary: such as "topk" or "topk/k32".

    Returns:
      Labels by feature; empty if the dictionary was not interpreted.

    Raises:
      UserError: the file of labels is damaged.
    """
    kind, member = kind_and_member(dictionary)
    for stage in ("atlas", "interpret"):
        path = Path(workdir) / stage / kind / member / LABELS
        if path.exists():
            return load_labels(path)
    return {}
