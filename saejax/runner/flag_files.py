"""Flag files: each is read once, because it may be a pipe (``--flagfile=<(...)``)."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from saejax.errors import UserError

_NAMES = ("-flagfile", "--flagfile")


class FileLine(str):
    """An argument that is a line of a flag file; ``place`` says of which, such as "my.flags, line 3"."""

    place = ""


def read_flag_files(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the lines of their flag files, as ``FileLine``, before the others.

    Of two arguments that set the same flag the later one counts, so the command line wins over its files.

    Args:
      arguments: the arguments of a command line, without the program's name. If they name no file they are returned
        unchanged.

    Raises:
      UserError: a file cannot be read, is not UTF-8 text, or is read from itself; or a value stands in quotes, which
        would be a part of it.
    """
    lines: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in _NAMES:
            others.append(argument)
            continue
        file = value if equals else next(rest, "")
        if not file:
            raise UserError("--flagfile is empty: name a file of flags, one a line")
        lines.extend(_read_lines(file, ()))
    return [*lines, *others]


def _read_lines(name: str, around: tuple[str, ...]) -> Iterator[FileLine]:
    """Yield the flags in a file, and in the files that its lines name; ``around`` are the files that named it."""
    if name in around:
        raise UserError(f"the flag file {name} is read from itself: leave out its line --flagfile={name}")
    try:
        text = Path(os.path.expanduser(name)).read_bytes().decode()
    except OSError as error:
        raise UserError(f"the flag file {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16, perhaps
        raise UserError(f"the flag file {name} is not UTF-8 text: save it as UTF-8")
    if text.startswith("\ufeff"):
        raise UserError(f"the flag file {name} begins with a byte order mark: save it as UTF-8 without one")
    # Not by ``splitlines``, which also splits inside texts, at U+2028 and others.
    for number, content in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = FileLine(content.strip())
        line.place = f"{name}, line {number}"
        flag, _, value = line.partition("=")
        if flag in _NAMES:
            yield from _read_lines(value.strip(), (*around, name))
        elif line and not line.startswith(("#", "//")):
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                raise UserError(f"{line.place}: no shell reads a flag file: leave out the quotes around {value}")
            yield line
