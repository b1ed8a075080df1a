"""What every binary does: run stages, and say in one line what went wrong.

Exit status: 0 done; 2 bad input (one line says what); 143 stopped by SIGTERM with the work saved; 1 a check that was
asked for failed (one line says which), or a bug, with its traceback.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from absl import flags

from saejax import command_line, environment
from saejax.buckets.bucket import is_bucket
from saejax.errors import NO_ROOM, CheckFailed, Interrupted, OtherEnded, UserError, out_of_room
from saejax.parallel.cluster import label
from saejax.parallel.parent import LOST, guarded
from saejax.settings import CaptureConfig, MeshConfig, TrainConfig

_LOST = re.compile("gloo|nccl|UNAVAILABLE|connection (closed|reset)", re.IGNORECASE)  # of a collective
_DISK = {
    **{number: f"{told}: free space, then run again" for number, told in NO_ROOM.items()},
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
}


def main(stages: Sequence[str], about: str, argv: Sequence[str] | None = None) -> None:
    """Runs a binary and exits with its status.

    Args:
      stages: the stages it runs.
      about: what it does, for ``--help``.
      argv: program name and arguments; default ``sys.argv``.
    """
    sys.exit(run(stages, about, sys.argv if argv is None else argv))


def run(stages: Sequence[str], about: str, argv: Sequence[str]) -> int:
    """Like ``main``, but returns the exit status."""
    flag_values = command_line.stage_flags()

    def work() -> None:
        configs = command_line.read_configs(flag_values, argv)
        if flag_values["help"].value:
            return _show(command_line.help_text(stages, about, flag_values))
        workdir = command_line.named_workdir(flag_values)
        runs_model = "capture" in stages or ("train" in stages and configs[TrainConfig].source == "model")
        shares_gpu = runs_model and configs[CaptureConfig].backend != "jax"
        environment.for_devices(bool(flag_values["deterministic"].value), shares_gpu)
        scratch = flag_values["scratch"].value or ""
        environment.keep_programs(configs[MeshConfig].compile_cache, command_line.local_folder(workdir, scratch))
        if is_bucket(workdir) and configs[MeshConfig].together and not scratch:
            raise UserError(
                "--scratch is missing: several processes with a workdir in a bucket work in one local folder, that all "
                "hosts share"
            )
        from saejax import pipeline
        from saejax.workspace import Workspace

        workspace = Workspace(workdir, scratch, bool(flag_values["break_lock"].value))
        pipeline.run_stages(stages, configs, workspace, timed_say(), stop_asked(), flag_values["unit"].value or "")

    processes, own, folder = command_line.processes_and_folder(argv)
    if processes != 1 and folder:  # before anything is imported that starts threads
        return guarded(lambda: ended(work, flag_values), folder, processes, own)
    return ended(work, flag_values)


def ended(work: Callable[[], None], flag_values: flags.FlagValues) -> int:
    """Does a program's work; says what went wrong in a line, and returns the exit status."""
    try:
        work()
        return 0
    except CheckFailed as failed:
        print(f"{label()}failed:", failed, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{label()}{stop}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except OtherEnded:  # the parent says which one, and how
        return LOST
    except flags.Error as error:
        return _refuse(f"{command_line.flag_error(error)}; --help lists the flags", flag_values)
    except UserError as error:
        return _refuse(str(error), flag_values)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _refuse(f"{error.filename or 'writing'}: {_DISK[error.errno]}", flag_values)
    except Exception as error:
        if label() and _LOST.search(str(error)):
            traceback.print_exc()
            return LOST
        if not (told := out_of_room(error)):
            raise
        return _refuse(f"{flag_values['workdir'].value}: {told}: free space, then run again", flag_values)


def _show(text: str) -> None:
    """Prints a long text, whose reader may leave before its end (``--help | head``)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends


def _refuse(message: str, flag_values: flags.FlagValues) -> int:
    if flag_values["debug"].value:
        traceback.print_exc()
    print(f"{label()}error:", " ".join(message.split()), file=sys.stderr)
    return 2


def timed_say() -> Callable[[str], None]:
    """Prints lines with the seconds since now before them."""
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    return say


def stop_asked() -> Callable[[], bool]:
    """Catches SIGTERM; returns a function that tells whether it came."""
    asked: list[int] = []
    with contextlib.suppress(ValueError):  # not the main thread (a test or a notebook): nobody signals it
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return lambda: bool(asked)
