"""The frame of every binary: run stages, and report errors in one line.

Exit status: 0 done; 2 bad input (one line says what); 143 or 130 stopped by SIGTERM or Ctrl-C with the work saved; 1 a
check that was asked for failed (one line says which), or a bug, with its traceback. No other exit has status 143, so
a batch system may restart exactly the jobs that end with it.
"""

import contextlib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from saejax.errors import NO_ROOM, CheckFailed, Interrupted, OtherFailed, UserError, out_of_room
from saejax.models.settings import ModelConfig
from saejax.parallel.cluster import joined_processes, process_label
from saejax.runner import command_line, environment, pipeline

_signals: list[int] = []  # that came since the handlers were installed
_DISK = {
    **{number: f"{reason}: free space, then run again" for number, reason in NO_ROOM.items()},
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
}


def main(stages: Sequence[str], about: str, argv: Sequence[str] | None = None) -> None:
    """Run a binary and exit with its status.

    Args:
      stages: names of the stages it runs.
      about: its purpose, for ``--help``.
      argv: program name and arguments; default ``sys.argv``.
    """
    sys.exit(run(stages, about, sys.argv if argv is None else argv))


def run(stages: Sequence[str], about: str, argv: Sequence[str]) -> int:
    """Run a binary like ``main``, but return the exit status."""
    flag_values = command_line.stage_flags()

    def work() -> None:
        configs = command_line.read_configs(flag_values, argv, stages)
        if flag_values["help"].value:
            return _show(command_line.help_text(stages, about, flag_values))
        workdir = command_line.named_workdir(flag_values)
        say = make_logger()
        say(f"the workdir is {workdir}")
        # Which family a model is of, and so what "auto" means, is only known once its files are there.
        shares_gpu = configs[ModelConfig].backend != "jax"
        # Before JAX is imported: it reads these variables when it first looks for devices.
        environment.for_devices(bool(flag_values["deterministic"].value), shares_gpu)
        environment.keep_programs(Path(workdir))
        options = pipeline.RunOptions(
            only=flag_values["unit"].value or "",
            take_over=bool(flag_values["take_over"].value),
            dry_run=bool(flag_values["dry_run"].value),
            keep_going=bool(flag_values["keep_going"].value),
            profile=flag_values["profile"].value or "",
            budget_device_hours=flag_values["budget_device_hours"].value or 0.0,
        )
        pipeline.run_stages(stages, configs, workdir, say, install_signal_handlers(), options)

    status = 1
    try:
        status = run_and_report(work, flag_values)
    except Exception:
        if not joined_processes():
            raise
        traceback.print_exc()
    if (processes := joined_processes()) and status:
        # An orderly end would wait for the other processes, which may wait for this one.
        processes.tell_failure(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def run_and_report(work: Callable[[], None], flag_values: flags.FlagValues) -> int:
    """Do a program's work, print an error in one line, and return the exit status."""
    try:
        work()
        return 0
    except CheckFailed as failed:
        print(f"{process_label()}failed:", failed, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{process_label()}{stop}", file=sys.stderr)
        return 128 + (_signals[0] if _signals else signal.SIGTERM)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the handlers are there
        print(f"{process_label()}stopped; finished units are kept: run the same command to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    except OtherFailed as failure:
        print(f"{process_label()}{failure}", file=sys.stderr)
        return failure.status
    except flags.Error as error:
        return _refuse(f"{command_line.flag_error(error)}; --help lists the flags", flag_values)
    except UserError as error:
        return _refuse(str(error), flag_values)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _refuse(f"{error.filename or 'writing'}: {_DISK[error.errno]}", flag_values)
    except Exception as error:
        if reason := out_of_room(error):
            return _refuse(f"{flag_values['workdir'].value}: {reason}: free space, then run again", flag_values)
        if not _is_out_of_memory(error):
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _refuse(
            f"memory is used up ({what}): experiments.preflight with the same flags says what each program needs and "
            "how to make it smaller; --debug shows where it was",
            flag_values,
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory of the host (numpy) or of a device (XLA, torch) could not be had."""
    text = str(error).lower()
    in_words = ("resource_exhausted" in text and "memory" in text) or "out of memory" in text
    return isinstance(error, MemoryError) or in_words


def _show(text: str) -> None:
    """Print a long text; its reader may stop early (``--help | head``)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends


def _refuse(message: str, flag_values: flags.FlagValues) -> int:
    if flag_values["debug"].value:
        traceback.print_exc()
    print(f"{process_label()}error:", " ".join(message.split()), file=sys.stderr)
    return 2


def make_logger() -> Callable[[str], None]:
    """Return a function that prints lines with the seconds since now before them."""
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    return say


def install_signal_handlers() -> Callable[[], bool]:
    """Catch SIGTERM and the first Ctrl-C; return a function that tells whether one of them came."""
    _signals.clear()

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT and _signals:
            raise KeyboardInterrupt
        _signals.append(number)

    with contextlib.suppress(ValueError):  # not the main thread (a test or a notebook): nobody signals it
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
    return lambda: bool(_signals)
