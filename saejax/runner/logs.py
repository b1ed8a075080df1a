"""Log files of a workdir: what is printed about each unit, in ``DIR/logs/<stage>-<name>.log``."""

import contextlib
from pathlib import Path

from saejax.runner.workspace import now

FOLDER = "logs"


def log_path(root: Path, unit: str, rank: int = 0) -> Path:
    """Return the log file of a unit.

    Args:
      root: the workdir.
      unit: such as "train/topk".
      rank: number of the process; others than the first have files of their own.
    """
    return root / FOLDER / (unit.replace("/", "-") + (f".{rank}" if rank else "") + ".log")


def log(path: Path, text: str) -> None:
    """Append a line, with the time, to a log file; a log that cannot be written stops no run."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{now()} {text}\n")
