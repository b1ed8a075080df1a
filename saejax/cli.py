"""The console command: ``saejax STAGE --group.field=value ...``, ``saejax --help``.

From the repository's root, ``python -m experiments.STAGE`` does the same. A stage of a plugin has the first form alone:
``saejax STAGE --plugins=FILE``.
"""

import importlib
import sys
from collections.abc import Sequence

from absl import flags

from saejax.runner import environment

environment.for_terminal()
environment.for_libraries()  # before the imports below load libraries that read the variables

from saejax.errors import UserError, one_of  # noqa: E402
from saejax.runner import command, plugins  # noqa: E402
from saejax.runner.flag_files import read_flag_files  # noqa: E402
from saejax.runner.registry import all_stages  # noqa: E402

PIPELINE = "pipeline"
ABOUT_PIPELINE = "pipeline: runs every stage; what is finished and unchanged is not run again."
#: programs that are more than stages: what they do, and the module whose function ``run`` runs one and returns the exit
#: status. It is loaded then: the study's takes as long to import as all stages.
OTHERS = {
    "study_run": ("runs the pipeline on several models, and writes one report of them all", "saejax.studies.run"),
    "runs": ("lists the units of a workdir, and removes those that nobody needs", "saejax.runner.runs"),
    "serve": ("shows the attribution graphs of a folder as living pages", "saejax.serving.run"),
}
#: programs that run further stages besides the stage of their name; the further stages have no program of their own.
ALSO = dict(baseline=("benchmark",))


def main(program: str = "") -> None:
    """Run a program and exit with its status, which ``saejax.runner.command`` explains.

    Args:
      program: its name, such as "train"; "": the first argument of the command line names it.
    """
    name, *arguments = [program, *sys.argv[1:]] if program else (sys.argv[1:] or [""])
    try:
        if name in ("--help", "-h", "help"):
            command.show_text(describe_programs())
            sys.exit(0)
        arguments = read_flag_files(arguments)
        # The stages of a plugin are known only when it has been loaded.
        plugins.load_named(arguments)
        if not name or name.startswith("-"):
            raise UserError("a program is missing: saejax STAGE --flag=value; saejax --help lists them")
        one_of(name, list_programs(), "program (saejax --help lists them; --plugins=FILE adds others)")
    except (UserError, flags.Error, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    command.leave(run(name, [sys.argv[0] if program else f"saejax {name}", *arguments]))


def run(program: str, argv: Sequence[str]) -> int:
    """Run a program and return its exit status.

    Args:
      program: one of ``list_programs()``.
      argv: the program's name and arguments.
    """
    if program in OTHERS:
        return importlib.import_module(OTHERS[program][1]).run(argv)
    if program == PIPELINE:
        return command.run(list(all_stages()), ABOUT_PIPELINE, argv)
    stages = (program, *ALSO.get(program, ()))
    about = f"{program}: {'; '.join(all_stages()[stage].summary for stage in stages)}."
    return command.run(stages, about, argv)


def list_programs() -> list[str]:
    """Return the names of all programs: the stages in the order in which they run, then the others."""
    within = {stage for others in ALSO.values() for stage in others}
    return [*(stage for stage in all_stages() if stage not in within), PIPELINE, *OTHERS]


def describe_programs() -> str:
    """Return the text of ``saejax --help``: each program with a line that says what it does."""
    about = {name: stage.summary for name, stage in all_stages().items()}
    about |= {PIPELINE: ABOUT_PIPELINE.partition(": ")[2].rstrip(".")} | {
        name: text for name, (text, _) in OTHERS.items()
    }
    width = max(map(len, list_programs()))
    lines = [f"  {name:{width}}  {about[name]}" for name in list_programs()]
    return "\n".join(["saejax STAGE --flag=value ...; saejax STAGE --help lists the flags of a stage.", "", *lines])


if __name__ == "__main__":
    main()
