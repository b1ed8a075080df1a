"""Command lines of the binaries: flags, the groups of settings that they fill, and the text of --help."""

import dataclasses
import difflib
import functools
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

from saejax.config import Configs, Text, group_name, is_of
from saejax.errors import UserError
from saejax.runner import plugins
from saejax.runner.flag_files import FileLine, read_flag_files
from saejax.runner.flags import define_flags, flag_fields, from_flags
from saejax.runner.registry import accepted_groups, all_groups, all_stages
from saejax.training.settings import TrainConfig

# The flags with which most runs begin, in the order in which --help lists them where a stage accepts them.
_COMMON = (
    "model.path", "corpus.path", "capture.sites", "train.sites", "train.kinds", "train.k", "train.expansion",
    "task.behaviours", "task.prompts", "ablate.dictionary", "graph.transcoders", "graph.prompt", "graph.target",
    "interpret.dictionaries", "model.dtype",
)  # fmt: skip
_NARROWEST = 60  # columns of a terminal to which --help is wrapped
# Flags of every binary: how each is defined, its default, its help.
_OF_BINARIES: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "plugins": (
        flags.DEFINE_multi_string, [], "Python files that add kinds of dictionary or stages, with commas between",
    ),
    "unit": (flags.DEFINE_string, "", "run only this unit, such as train/topk"),
    "dry_run": (
        flags.DEFINE_bool, False,
        "print which units are done, which are left and because of which setting or input, and run nothing",
    ),
    "keep_going": (
        flags.DEFINE_bool, False,
        "continue after a failure with the units that do not depend on it, and list the failures at the end",
    ),
    "take_over": (
        flags.DEFINE_bool, False, "replace the lock (claim.json) that a process which is gone has left on a unit",
    ),
    "profile": (flags.DEFINE_string, "", "folder for a jax.profiler trace of a few steps of each unit"),
    "budget_device_hours": (
        functools.partial(flags.DEFINE_float, lower_bound=0.0), 0.0,
        "device-hours of the workdir after which no further unit starts, with a warning from 80 % on; 0: no limit",
    ),
    "deterministic": (flags.DEFINE_bool, False, "give the same bits in every run on a GPU, which is slower"),
    "debug": (flags.DEFINE_bool, False, "also show the traceback of bad input"),
}  # fmt: skip


def stage_flags() -> flags.FlagValues:
    """Return the flags of every binary without the groups' flags, which ``read_configs`` defines after plugins."""
    flag_values = flags.FlagValues()
    define_common(flag_values, *_OF_BINARIES)
    return flag_values


def define_common(flag_values: flags.FlagValues, *names: str) -> None:
    """Define some of the flags of every binary, and those of every program: ``--workdir`` and ``--help``."""
    flags.DEFINE_string("workdir", "", "folder of this run; stages write <workdir>/<stage>/", flag_values=flag_values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=flag_values)
    for name in names:
        define, default, help_text = _OF_BINARIES[name]
        define(name, default, help_text, flag_values=flag_values)


def read_configs(flag_values: flags.FlagValues, argv: Sequence[str], stages: Sequence[str] | None = None) -> Configs:
    """Parse a command line of flags alone and return every group of configuration; none if help is asked for.

    Args:
      flag_values: the flags of ``stage_flags``, and perhaps others.
      argv: program name and arguments, perhaps with the lines of flag files already (``read_flag_files``).
      stages: the stages of the binary. Flags of stages that these do not read are ignored in flag files, which are
        shared, and refused on the command line. None: all flags are accepted.

    Raises:
      UserError: an argument is no flag, a value is out of range, a flag belongs to another stage, a line of a flag
        file ends in a comment, or a plugin cannot be loaded.
      flags.Error: a flag is unknown or cannot be read.
    """
    argv = [argv[0], *read_flag_files(argv[1:])]
    # Plugins define settings, so they are loaded before flags are defined.
    plugins.load_named(argv[1:])
    define_flags(all_groups(), flag_values)
    _refuse_comments(argv)
    try:
        rest = flag_values(list(argv), known_only=False)
    except flags.Error as error:
        message, named = flag_error(error), re.search(r"flag '?-*( ?[\w.]+( .*?(?='))?)", str(error))
        where = _line_of(argv, lambda line: f"{line}:" in message)  # the flag with its value
        if named and not any(_flag_of(argument) == named[1] for argument in _without_lines(argv)):  # or else its name
            where = where or _line_of(argv, lambda line: _flag_of(line) == named[1])
        if named and named[1].count(".") == 2:  # such as train.topk.k
            message += "; a kind of your own has its flags with --plugins=FILE"
        raise flags.Error(where + message) from error
    if flag_values["help"].value:
        return Configs()
    if len(rest) > 1:
        argument = f"{_line_of(argv, rest[1].__eq__)}{textwrap.shorten(rest[1], 80)!r}"
        expected = "flags are --group.field=value; --help lists them"
        if os.path.isfile(rest[1]) or rest[1].endswith(".flags"):
            expected = f"a file of flags is read with --flagfile={rest[1]}"
        raise UserError(f"{argument} is not a flag: {expected}")
    accepted = None
    if stages is not None:
        accepted = accepted_groups(stages)
        _refuse_others(argv, stages, accepted)
    return _name_trained(from_flags(all_groups(), flag_values, accepted), flag_values)


def _name_trained(configs: Configs, flag_values: flags.FlagValues) -> Configs:
    """Return the configuration in which stages take the kind that is trained, if it is one, unless a flag names one."""
    kinds = configs[TrainConfig].kinds
    for group in configs if len(kinds) == 1 else ():
        flag = f"{group_name(type(group))}.dictionary"
        # An empty default stands for no dictionary.
        if flag in flag_values and not flag_values[flag].present and flag_values[flag].value:
            configs |= dataclasses.replace(group, **{"dictionary": kinds[0]})
    return configs


def _refuse_others(argv: Sequence[str], stages: Sequence[str], accepted: Sequence[str]) -> None:
    """Raise a ``UserError`` for a flag of the command line itself that belongs to a stage which is not read."""
    for argument in _without_lines(argv):
        flag = argument.lstrip("-").partition("=")[0] if argument.startswith("-") else ""
        names = {flag, flag.removeprefix("no")}  # absl writes a false flag as --noNAME
        groups = {name for name, group in all_groups().items() if names & flag_fields(name, group).keys()}
        if groups and not groups & {*accepted}:
            read_by = {name: {*map(group_name, stage.groups)} for name, stage in all_stages().items()}
            # First the stage that has the name of the group.
            owners = sorted(
                (name for name in all_stages() if groups & read_by[name]), key=lambda name: name not in groups
            )
            raise UserError(
                f"--{flag} belongs to the stage {' or '.join(owners)}, which {stages[0]} does not read: "
                "leave it out (in a flag file it is ignored)"
            )


def _refuse_comments(argv: Sequence[str]) -> None:
    """Raise a ``UserError`` for a comment behind a flag in a flag file, which would be a part of the value."""
    fields = {flag: field for name, group in all_groups().items() for flag, field in flag_fields(name, group).items()}
    texts = {flag for flag, field in fields.items() if is_of(field, Text)}
    for line in argv:
        if isinstance(line, FileLine) and _flag_of(line) not in texts and (comment := re.search(r"\s(#|//)", line)):
            flag, sign = textwrap.shorten(line[: comment.start()], 80), comment[1]
            raise UserError(
                f"{line.place}: a comment needs a line of its own: leave out what follows {flag}, or, if {sign} is a "
                "part of the value, give the flag on the command line"
            )


def _without_lines(argv: Sequence[str]) -> list[str]:
    """Return the arguments of the command line itself."""
    return [argument for argument in argv[1:] if not isinstance(argument, FileLine)]


def _flag_of(argument: str) -> str:
    """Return the name of the flag that an argument, or a line of a flag file, sets."""
    return argument.lstrip("-").partition("=")[0]


def _line_of(argv: Sequence[str], matches: Callable[[str], bool]) -> str:
    """Return the place of the flag file's line that ``matches``, to begin an error message; "" if there is none."""
    return next((f"{line.place}: " for line in argv if isinstance(line, FileLine) and matches(line)), "")


def named_workdir(flag_values: flags.FlagValues) -> str:
    """Return the folder of the run; raise a ``UserError`` if none is named."""
    workdir = flag_values["workdir"].value
    if not workdir:
        raise UserError("--workdir=DIR is missing: name the folder of this run")
    # No shell expands ~ behind an equals sign, and a folder named ~ would be made here.
    return os.path.expanduser(workdir)


def help_text(stages: Sequence[str], about: str, flag_values: flags.FlagValues) -> str:
    """Return the text of ``--help``: what the binary does, and every flag that it accepts, with its default."""
    groups = {group: flag_fields(group, all_groups()[group]) for group in accepted_groups(stages)}
    fields = {name: field for of_group in groups.values() for name, field in of_group.items()}
    # First the usual flags, model, text and the stage's own before others; then the stage's other flags. Eight in all:
    # --workdir and --flagfile make ten.
    about_stage = {"model", "corpus", "task", *stages}
    usual = sorted((name for name in _COMMON if name in fields), key=lambda name: name.split(".")[0] not in about_stage)
    ranked = [*usual, *(name for stage in stages[:1] for name in groups.get(stage, ()))]
    common = list(dict.fromkeys(ranked))[:8]

    def explain(names: Iterable[str]) -> list[str]:
        """Return a line for each flag of groups."""
        lines = []
        for name in names:
            default = fields[name].default
            default = ",".join(map(str, default)) if isinstance(default, tuple) else default
            lines.append(f"  --{name}  {flag_values[name].help} (default: {default if default != '' else 'empty'})")
        return lines

    lines = [
        about,
        "",
        "The most common flags:",
        "  --workdir  folder of this run, in which stages write <workdir>/<stage>/ (required)",
        "  --flagfile  read flags from a file, one a line; flags on the command line win (default: none)",
        *explain(common),
        "",
        "Flags of every stage:",
    ]
    for name, (_, value, text) in _OF_BINARIES.items():
        lines.append(f"  --{name}  {text} (default: {value if value not in ('', []) else 'none'})")
    listed = set(common)
    for group, of_group in groups.items():
        lines += ["", *f"{group}: {(all_groups()[group].__doc__ or '').strip()}".splitlines()]
        lines += explain(name for name in of_group if name not in listed)  # a flag of several groups is listed once
        listed |= {*of_group}
    if len(groups) < len(all_groups()):
        lines += ["", "Flags of other stages are refused here, and ignored in a flag file, which stages can share."]
    width = max(shutil.get_terminal_size((100, 24)).columns, _NARROWEST)
    return "\n".join(_wrap(line, width) for line in lines)


def _wrap(line: str, width: int) -> str:
    """Return a line broken at words, with what follows its first line indented."""
    indent = " " * 6 if line.startswith("  --") else ""
    options: dict[str, Any] = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(line, width, subsequent_indent=indent, **options) if line.strip() else ""


def flag_error(error: flags.Error) -> str:
    """Return absl's description of a flag error, with at most the three nearest of the names that it suggests."""
    message = str(error).removeprefix("ERROR:: ")
    for theirs, plain in (
        (r"\('Non-boolean argument to boolean flag', (.*)\)", r"\1 is neither true nor false"),
        (r"invalid literal for int\(\) with base \d+: (.*)", r"\1 is not a whole number"),
        ("could not convert string to float: (.*)", r"\1 is not a number"),
    ):
        message = re.sub(theirs, plain, message)
    if parts := re.fullmatch(r"(.* flag '(.*)'\. Did you mean: )(.*) \?", message, re.DOTALL):
        start, name, suggested = parts.groups()
        nearest = difflib.get_close_matches(name.lower(), suggested.split(", "), 3, 0.0)
        message = f"{start}{', '.join(nearest)} ?"
    return message
