"""The metrics of a train unit: a file ``metrics.jsonl`` for each member."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.files import read_object, whole_file
from saejax.links import member_folder
from saejax.runner.workspace import STACK
from saejax.training.metrics import METRICS, record_line


def split_metrics(path: Path, folders: Mapping[str, Path]) -> None:
    """Write the records of members of a stack to files in folders of their own, where they have no names.

    Args:
      path: the records of all members.
      folders: the folder of each member whose records are written, by name.
    """
    lines: dict[str, list[str]] = {member: [] for member in folders}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["member"] in lines:
            lines[record["member"]].append(record_line(record | dict(member="")))
    for member, folder in folders.items():
        with whole_file(folder / METRICS) as temporary:
            temporary.write_text("".join(lines[member]))


def read_metrics(unit: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the metrics of all members of a train unit, in the order of steps of each.

    Args:
      unit: folder of the unit.
      names: names of the metrics.

    Yields:
      For each recorded step and member these metrics as floats, and "member".

    Raises:
      UserError: the file is missing or damaged.
    """
    members = [*read_object(unit / STACK, "members")["members"]] if (unit / STACK).exists() else [""]
    for member in members:
        path = member_folder(unit, member) / METRICS
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                yield dict(member=member or record["member"]) | {name: float(record[name]) for name in names}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is missing or damaged: expected one JSON object with member, {', '.join(names)} per line; "
                f"delete {unit} and run the same command again"
            ) from None
