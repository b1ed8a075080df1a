"""Where a train unit's metrics are recorded, and how they are read."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.settings import TrainConfig

METRICS = "metrics.jsonl"


def log_folder(unit: Path, config: TrainConfig) -> Path:
    """Where the checkpoints and metrics of a unit's stack are: in the unit, or in a folder for each expansion."""
    return unit / f"expansion{config.expansion}" if config.expansions else unit


def recorded(unit: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The metrics of all members of a train unit, in the order of steps of each.

    Args:
      unit: its folder.
      names: of the metrics that are needed.

    Yields:
      One for each recorded step and member: these metrics as floats, and "member".

    Raises:
      UserError: the file is missing or damaged.
    """
    for path in sorted(unit.glob(f"expansion*/{METRICS}")) or [unit / METRICS]:
        try:
            for text in path.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                yield dict(member=line["member"]) | {name: float(line[name]) for name in names}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is missing or damaged: expected one JSON object with member, {', '.join(names)} per line; "
                f"delete {unit} and run the same command again"
            ) from None
