"""Checks before anything runs: what stages refuse of their settings, and what flags name that is not there."""

import os
from collections.abc import Sequence
from pathlib import Path

from saejax.config import Configs
from saejax.dictionaries.formats.place import resolve_path
from saejax.errors import UserError
from saejax.runner.registry import all_stages, flag_of
from saejax.runner.workplan import Workplan


def check_stages(stages: Sequence[str], configs: Configs, workdir: Path) -> None:
    """Check the settings of stages that have units, and that the files and folders that these name are there.

    A folder that is missing passes where an earlier one of the stages makes it, such as DIR/train/topk.

    Args:
      stages: their names, in the order in which they run.
      configs: all settings.
      workdir: DIR.

    Raises:
      UserError: a stage refuses its settings, or places are missing, all of which are named.
    """
    plan, earlier, missing = Workplan(configs), list[str](), dict[str, None]()
    for stage in (all_stages()[name] for name in stages):
        units = stage.units(configs)
        if units:
            stage.check(configs)
            for setting, places in stage.places(configs).items():
                for place in places:
                    if not _is_there(place) and not _is_made(place, workdir, earlier, plan):
                        missing[f"--{flag_of(setting)}={place}"] = None
        earlier += units
    if missing:
        does, it = ("does", "it") if len(missing) == 1 else ("do", "them")
        raise UserError(
            f"{', '.join(missing)} {does} not exist, and this run does not make {it}: name files or folders that are "
            "there"
        )


def _is_there(place: str) -> bool:
    return resolve_path(place).exists()


def _is_made(place: str, workdir: Path, units: Sequence[str], plan: Workplan) -> bool:
    """Return whether a place is the folder of one of some units or of a member, is inside of these or holds them."""
    for path, root in ((resolve(place), resolve(workdir)) for resolve in (os.path.abspath, os.path.realpath)):
        if not Path(path).is_relative_to(root):
            continue
        parts = Path(path).relative_to(root).parts
        for unit in units:
            names, members = tuple(unit.split("/")), plan.members(unit)
            inside = parts[len(names) :]
            if parts == names[: len(parts)] or (parts[: len(names)] == names and (not members or inside[0] in members)):
                return True
    return False
