"""The labels of features, whoever gives them: rules, a language model, Neuronpedia's users or the user's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from saejax.config import Configs
from saejax.dictionaries.labels import COLUMNS, LABELS, Label, load_labels, read_sheet, unused_labels
from saejax.dictionaries.names import full_name
from saejax.errors import Faults, UserError
from saejax.interpret.labels import label_files, read_explanations, read_labels, unused_lines
from saejax.links import member_folder
from saejax.models.identity import content_sha256
from saejax.runner.registry import all_stages
from saejax.runner.workspace import Run
from saejax.stages.atlas.settings import AtlasConfig
from saejax.stages.interpret.settings import InterpretConfig


class MemberLabels(NamedTuple):
    """The labels of a dictionary's features, by feature."""

    automatic: dict[int, Label]
    by_hand: dict[int, Label]  #: in place of automatic ones


def units_of_labels(configs: Configs, kind: str) -> tuple[str, ...]:
    """Return the units that describe and label the features of a kind of dictionary."""
    judged = f"explain/{kind}"
    return (f"interpret/{kind}", *([judged] if judged in all_stages()["explain"].units(configs) else []))


def hash_label_files(configs: Configs) -> str:
    """Return the hash of the files of labels; "" without any."""
    files = [file for some in label_files(Path(configs[AtlasConfig].labels or "-")) for file in some]
    return "-".join(content_sha256(file) for file in files if file.is_file())  # what is missing is said before


def must_name_dictionaries(configs: Configs) -> str:
    """Return whether labels have to name their dictionary, because several kinds are shown; "" without labels."""
    return str(len(configs[InterpretConfig].dictionaries) > 1) if configs[AtlasConfig].labels else ""


def check_label_files(configs: Configs) -> None:
    """Read the files of labels as far as that takes no dictionary; a ``UserError`` tells all that is wrong."""
    path = configs[AtlasConfig].labels
    sheets, exported = label_files(Path(path)) if path else ([], [])
    if path and not any(file.is_file() for file in (*sheets, *exported)):
        raise UserError(
            f"--atlas.labels={path} is no file of labels: name a .csv file, Neuronpedia's .jsonl or .jsonl.gz, or a "
            "folder of such"
        )
    named = ("dictionary",) if len(configs[InterpretConfig].dictionaries) > 1 else ()
    faults = Faults(path, "are no labels", "files")
    for sheet in sheets:
        with faults.collect(sheet.name):
            read_sheet(sheet, (*COLUMNS, *named), "--atlas.labels")
    faults.refuse()


def read_member_labels(run: Run, kind: str, features: Mapping[str, int]) -> dict[str, MemberLabels]:
    """Return the labels of the dictionaries of a kind, by member.

    Args:
      run: of a stage that reads the units of ``units_of_labels``.
      kind: the kind, as in "interpret/<kind>".
      features: number of features of each member.

    Raises:
      UserError: the file of labels cannot be read, or names a feature that does not exist.
    """
    path, kinds = Path(run.configs[AtlasConfig].labels), run.configs[InterpretConfig].dictionaries
    several = len(features) > 1 or len(kinds) > 1
    names = [full_name(kind, member) for member in features]
    sheets, exported = label_files(path) if run.configs[AtlasConfig].labels else ([], [])
    if exported and several:
        raise UserError(
            f"--atlas.labels={path} has explanations from Neuronpedia, which are of one dictionary: interpret one "
            "alone, with --interpret.dictionaries"
        )
    by_hand = [
        read_labels(path, name, count, several) if sheets else {}
        for name, count in zip(names, features.values(), strict=True)
    ]
    others = [other for other in kinds if other != kind]
    if unused := unused_lines(path, names, others) if sheets else ():
        run.say(f"warning: {unused_labels(f'--atlas.labels={path}', unused, names)}")
    labels = {}
    for (member, count), hand_labels in zip(features.items(), by_hand, strict=True):
        automatic = load_labels(member_folder(run.inputs[f"interpret/{kind}"], member) / LABELS)
        if explained := run.inputs.get(f"explain/{kind}"):
            automatic |= load_labels(explained / member / LABELS)
        labels[member] = MemberLabels(automatic | read_explanations(exported, count), hand_labels)
    return labels
