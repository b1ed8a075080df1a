"""Labels and names of features, found by a workdir, a dictionary's name in it, or the folders of train units."""

import types
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from saejax.dictionaries.labels import LABELS, Label, load_labels
from saejax.dictionaries.names import full_name, kind_and_member
from saejax.interpret.feature_record import iterate_records, top_tokens
from saejax.links import member_folder
from saejax.runner.stacks import find_results, members
from saejax.runner.workspace import SUMMARY


class TrainedLayer(NamedTuple):
    """The dictionary of a layer that was trained in a workdir."""

    workdir: Path
    name: str  # such as "topk/mlp_in.3"
    site: str  # that it reads


def labels_of_folders(folders: Iterable[str | Path]) -> dict[tuple[int, int], str]:
    """Return the labels of features of dictionaries, by layer and number; for the folders see ``trained_layers``.

    Raises:
      UserError: a file of labels, or a unit's summary, is damaged.
    """
    labels: dict[tuple[int, int], str] = {}
    for layer, trained in trained_layers(folders).items():
        by_feature = labels_of(trained.workdir, trained.name)
        labels |= {(layer, feature): label.label for feature, label in by_feature.items()}
    return labels


def trained_layers(folders: Iterable[str | Path]) -> dict[int, TrainedLayer]:
    """Return the dictionaries of train units, or of their members, by layer.

    Folders are such as DIR/train/topk; others have none. A damaged summary is a ``UserError``.
    """
    trained: dict[int, TrainedLayer] = {}
    for folder in map(Path, folders):
        unit = next((path for path in (folder, folder.parent) if path.parent.name == "train"), None)
        if not unit or not (unit / SUMMARY).exists():
            continue
        for member in members(unit, layers=True):
            layer = member.site.rpartition(".")[2]
            if layer.isdigit() and folder in (unit, unit / member.name):
                name = full_name(unit.name, member.name)
                trained[int(layer)] = TrainedLayer(unit.parent.parent, name, member.site)
    return trained


def names_and_sites(folders: Iterable[str | Path]) -> dict[int, tuple[str, str]]:
    """Return names and sites of dictionaries by layer, as ``labels_of_sheets`` takes them; see ``trained_layers``."""
    return {layer: (trained.name, trained.site) for layer, trained in trained_layers(folders).items()}


def names_of_layers(folders: Iterable[str | Path], layers: Collection[int]) -> dict[int, str]:
    """Return the names of the dictionaries of layers, as a sheet has them: "topk/mlp_in.3", or "layer 3" if others."""
    trained = trained_layers(folders)
    return {layer: trained[layer].name if layer in trained else f"layer {layer}" for layer in layers}


def labels_in(folders: Mapping[str, Path], dictionary: str) -> Mapping[int, Label]:
    """Return the labels of features, as ``labels_of``, if a run with these units' folders interpreted them."""
    kind, member = kind_and_member(dictionary)
    unit, trained = folders.get(f"interpret/{kind}"), folders.get(f"train/{kind}")
    if not unit:
        return {}
    return labels_of(unit.parent.parent, dictionary, trained and member_folder(trained, member), folders)


def labels_of(
    workdir: Path | str,
    dictionary: str,
    trained: Path | None = None,
    units: Mapping[str, Path] = types.MappingProxyType({}),
) -> Mapping[int, Label]:
    """Return the labels of a dictionary's features: labels given by hand if there are any, else the labels found.

    The ``dictionary`` is such as "topk" or "topk/k32"; for its folder ``trained`` and ``units`` see ``find_results``.
    There are none if it was not interpreted since it was trained.
    """
    for stage in ("atlas", "interpret"):
        folder = find_results(workdir, stage, dictionary, trained, units)
        if folder and (folder / LABELS).exists():
            return load_labels(folder / LABELS)
    return {}


def feature_names(
    workdir: Path | str,
    dictionary: str,
    trained: Path | None = None,
    units: Mapping[str, Path] = types.MappingProxyType({}),
) -> dict[int, str]:
    """Return the names of the features of an interpreted dictionary: the label, or else the top tokens in quotes.

    Args:
      workdir: workdir of the run.
      dictionary: such as "topk" or "topk/k32".
      trained: its folder, as ``find_results`` takes it.
      units: folders of the units that a run reads, likewise.

    Returns:
      Names by feature; empty if the dictionary was not interpreted since it was trained.
    """
    if not (folder := find_results(workdir, "interpret", dictionary, trained, units)):
        return {}
    records = iterate_records(folder)
    names = {record["feature"]: top_tokens(record) for record in records if record.get("tokens")}
    return names | {feature: label.label for feature, label in labels_of(workdir, dictionary, trained, units).items()}
