"""The binary ``study_run``: the pipeline on several models, and one report of them all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from saejax.errors import UserError
from saejax.runner import command, command_line, environment
from saejax.runner.flag_files import read_flag_files
from saejax.studies.rows import read_rows
from saejax.studies.study import run_study_rows

ABOUT = """\
study_run: runs the pipeline on every row of a study, and writes one report of them all.

  --workdir=DIR  folder of the study; each row works in DIR/rows/<name>/ (required)
  --take_over  replace the locks (claim.json) that a study whose process is gone has left
  --rows=FILE,FOLDER  flag files, one for each row, and folders of them (required)
  --at_once=N  rows that run at a time, each on an equal share of the host's GPUs, or else of its cores (default 1)
  --debug  also show the traceback of bad input

All other flags are those of experiments.pipeline; they hold for every row, and win over its file. What is finished and
unchanged is not run again. A unit that fails stops no other row; the exit status is 1 then, and the report says why."""


def run(argv: Sequence[str]) -> int:
    """Run the binary and return its exit status."""
    flag_values = flags.FlagValues()
    command_line.define_common(flag_values, "take_over", "debug")
    flags.DEFINE_list("rows", [], "", flag_values=flag_values)
    flags.DEFINE_integer("at_once", 1, "", lower_bound=1, flag_values=flag_values)

    def work() -> None:
        _, *common = flag_values([argv[0], *read_flag_files(argv[1:])], known_only=True)
        if flag_values["help"].value:
            return command.show_text(ABOUT)
        workdir = command_line.named_workdir(flag_values)
        if not flag_values["rows"].value:
            raise UserError("--rows=FILE,FOLDER is missing: name the flag files of the study's rows, or their folder")
        rows = read_rows(flag_values["rows"].value, common)
        more: dict[str, Any] = {name: flag_values[name].value for name in ("at_once", "take_over")}
        environment.keep_programs(Path(workdir))  # of all rows: models of one architecture have the same programs
        run_study_rows(workdir, rows, command.make_logger(), command.install_signal_handlers(), **more)

    return command.run_and_report(work, flag_values)
