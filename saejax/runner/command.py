"""The frame of every binary: run stages, and report errors in one line.

Exit status: 0 done; 2 bad input (one line says what); 143, 130 or 129 stopped by SIGTERM, Ctrl-C or SIGHUP with the
work saved; 1 a check that was asked for failed (one line says which), or a bug, with its traceback. No other exit has
status 143, so a batch system may restart exactly the jobs that end with it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from absl import flags

from saejax.errors import REFUSED, CheckFailed, Interrupted, OtherFailed, UserError, out_of_room
from saejax.models.settings import ModelConfig
from saejax.parallel.cluster import joined_processes, process_label
from saejax.parallel.stopping import is_interruptible
from saejax.runner import command_line, environment, pipeline

_signals: list[int] = []  # that came since the handlers were installed
_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_asked = threading.Event()  # set when the main thread has learned of a signal, or the work is over
_pipe: list[int] = []  # into which the system writes the numbers of signals
_PATIENCE = 20.0  # seconds for which a signal waits to be asked for
_STOPPED = "stopped; finished units are kept: run the same command to go on"


def leave(status: int) -> NoReturn:
    """End the process; after a signal without an orderly end, which would wait for threads, such as a download's."""
    if _signals and status:
        _exit_now(status)
    sys.exit(status)


def run(stages: Sequence[str], about: str, argv: Sequence[str]) -> int:
    """Run a binary and return its exit status.

    Args:
      stages: names of the stages it runs.
      about: its purpose, for ``--help``.
      argv: program name and arguments.
    """
    flag_values = command_line.stage_flags()

    def work() -> None:
        configs = command_line.read_configs(flag_values, argv, stages)
        if flag_values["help"].value:
            return show_text(command_line.help_text(stages, about, flag_values))
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
            profile=os.path.expanduser(flag_values["profile"].value or ""),
            budget_device_hours=flag_values["budget_device_hours"].value or 0.0,
        )
        pipeline.run_stages(stages, configs, workdir, say, install_signal_handlers(), options)

    status = 1
    try:
        status = run_and_report(work, flag_values)
    except Exception:
        if not (processes := joined_processes()):
            raise
        traceback.print_exc()
        with contextlib.suppress(Exception):  # the service may be gone
            # What was computed together with a process that has ended fails, too.
            status = (processes.failure() or (0, status))[1]
    if (processes := joined_processes()) and status:
        # An orderly end would wait for the other processes, which may wait for this one.
        processes.tell_failure(status)
        _exit_now(status)
    return status


def _exit_now(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
    except KeyboardInterrupt:  # a second Ctrl-C, one before the handlers are there, or nobody has asked for long
        print(f"{process_label()}{_STOPPED}", file=sys.stderr)
        return 128 + (_signals[0] if _signals else signal.SIGINT)
    except OtherFailed as failure:
        print(f"{process_label()}{failure}", file=sys.stderr)
        return failure.status
    except flags.Error as error:
        return _refuse(f"{command_line.flag_error(error)}; --help lists the flags", flag_values)
    except UserError as error:
        return _refuse(str(error), flag_values)
    except BrokenPipeError:
        _drop_output(sys.stdout)
        return _refuse(
            "nobody reads the output any more (it went to a program such as head, which has ended): finished units are "
            "kept; run the same command to go on",
            flag_values,
        )
    except OSError as error:
        if error.errno not in REFUSED and not out_of_room(error):  # copies of folders say it in words
            raise
        reason = f"{room}: free space, then run again" if (room := out_of_room(error)) else str(error.strerror).lower()
        return _refuse(f"{error.filename or flag_values['workdir'].value}: {reason}", flag_values)
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
    finally:
        _asked.set()


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory of the host (numpy) or of a device (XLA, torch) could not be had."""
    text = str(error).lower()
    in_words = ("resource_exhausted" in text and "memory" in text) or "out of memory" in text
    return isinstance(error, MemoryError) or in_words


def show_text(text: str) -> None:
    """Print a long text; its reader may stop early (``--help | head``), which ends nothing."""
    with contextlib.suppress(BrokenPipeError):
        _print(text)


def _print(text: str) -> None:
    """Print a text at once; where that fails, nothing is printed from then on, as Python does when it ends."""
    try:
        print(text, flush=True)
    except OSError as error:
        error.filename = "standard output"  # a file on a full disk, perhaps
        _drop_output(sys.stdout)
        raise


def _drop_output(*streams: TextIO) -> None:
    """Let what is printed to streams from now on go nowhere; otherwise Python complains again when it ends."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refuse(message: str, flag_values: flags.FlagValues) -> int:
    if flag_values["debug"].value:
        traceback.print_exc()
    print(f"{process_label()}error:", " ".join(message.split()), file=sys.stderr)
    return 2


def make_logger() -> Callable[[str], None]:
    """Return a function that prints lines with the seconds since now before them."""
    start = time.monotonic()
    return lambda line: _print(f"[{time.monotonic() - start:6.1f} s] {line}")


def install_signal_handlers() -> Callable[[], bool]:
    """Catch SIGTERM, SIGHUP and the first Ctrl-C; return a function that tells whether one of them came.

    A main thread that does not ask for a while, such as one that downloads or writes a large export, is interrupted as
    by a second Ctrl-C. If even that does not reach it, because it compiles or waits outside of Python, the process ends
    a while later. Files appear whole or not at all, so no moment is a wrong one.
    """
    _signals.clear()
    _asked.clear()
    overdue = threading.Event()

    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would fail
            _drop_output(*terminals)
        again = bool(_signals) and (number == signal.SIGINT or overdue.is_set())
        _signals.append(number)
        if again or is_interruptible():
            raise KeyboardInterrupt

    def insist(pipe: int) -> None:
        number = next((byte[0] for byte in iter(lambda: os.read(pipe, 1), b"") if byte[0] in _CAUGHT), None)
        if number is None:  # the handlers were installed anew
            os.close(pipe)
            return
        # The pipe stays open: a server raises the signal again when it has ended, which is written there, too.
        if _asked.wait(_PATIENCE):
            return
        overdue.set()
        signal.pthread_kill(main_thread, number)
        if not _asked.wait(_PATIENCE):
            print(f"{process_label()}{_STOPPED}", file=sys.stderr)
            if processes := joined_processes():
                processes.tell_failure(128 + number)
            _exit_now(128 + number)

    def stopping() -> bool:
        # Other threads ask as well, whose answers may not reach the main thread.
        if _signals and threading.get_ident() == main_thread:
            _asked.set()
        return bool(_signals)

    main_thread = threading.main_thread().ident or 0
    with contextlib.suppress(ValueError):  # not the main thread (a test or a notebook): nobody signals it
        for number in _CAUGHT:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup asks for
                signal.signal(number, on_signal)
        # A thread hears of signals by this pipe while the main thread is outside of Python, and no handler runs.
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for earlier in _pipe:
            os.close(earlier)
        _pipe[:] = [write]
        threading.Thread(target=insist, args=(read,), name="saejax-signal", daemon=True).start()
    return stopping
