"""Labels of features, as the stages ``interpret``, ``explain`` and ``atlas`` write them and all pages read them."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from saejax.dictionaries.stacks import full_name, kind_and_member, members
from saejax.files import read_json
from saejax.results import from_json
from saejax.runner.workspace import SUMMARY

LABELS = "labels.json"
EXPLAINED = "explained.json"  # how a language model judged labels, beside those that it wrote
FOUND = "detector"  # who gave a label that was found


@dataclasses.dataclass(frozen=True)
class Label:
    """The label of a feature."""

    label: str  #: in words
    by: str  #: who says so: "detector", a language model's name, or a reviewer's
    note: str = ""  #: by the reviewer
    f1: float | None = None  #: of the detector on held-out text; None for a label by hand


def load_labels(path: Path) -> dict[int, Label]:
    """Read the labels in a file that a stage wrote, by feature.

    Raises:
      UserError: it is missing or damaged.
    """
    return dict(from_json(dict[int, Label], read_json(path), path))


def labels_of_folders(folders: Iterable[str | Path]) -> dict[tuple[int, int], str]:
    """Return the labels of features of dictionaries, by layer and number.

    Args:
      folders: train units of workdirs, such as DIR/train/topk, or members of them; others have no labels.

    Raises:
      UserError: a file of labels, or a unit's summary, is damaged.
    """
    labels: dict[tuple[int, int], str] = {}
    for layer, (workdir, name) in trained_units(folders).items():
        labels |= {(layer, feature): label.label for feature, label in labels_of(workdir, name).items()}
    return labels


def trained_units(folders: Iterable[str | Path]) -> dict[int, tuple[Path, str]]:
    """Return the dictionaries of train units, or of their members, by layer: workdir and name, as "topk/mlp_in.3".

    Args:
      folders: such as DIR/train/topk; those that are no such have none.

    Raises:
      UserError: a unit's summary is damaged.
    """
    trained: dict[int, tuple[Path, str]] = {}
    for folder in map(Path, folders):
        unit = next((path for path in (folder, folder.parent) if path.parent.name == "train"), None)
        if not unit or not (unit / SUMMARY).exists():
            continue
        for member in members(unit, layers=True):
            layer = member.site.rpartition(".")[2]
            if layer.isdigit() and folder in (unit, unit / member.name):
                trained[int(layer)] = unit.parent.parent, full_name(unit.name, member.name)
    return trained


def labels_in(folders: Mapping[str, Path], dictionary: str) -> Mapping[int, Label]:
    """Return the labels of features, as ``labels_of``, if a run with these units' folders interpreted them."""
    kind, _ = kind_and_member(dictionary)
    unit = folders.get(f"interpret/{kind}")
    return labels_of(unit.parent.parent, dictionary) if unit else {}


def labels_of(workdir: Path | str, dictionary: str) -> Mapping[int, Label]:
    """Return the labels of a dictionary's features: those given by hand if there are any, else those that were found.

    Args:
      workdir: workdir of the run.
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
