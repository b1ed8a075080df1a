"""Processes forked from one that has imported what a run imports, which takes most of the time of a short one."""

import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

SERVE = "import sys; sys.path.append('tests'); import forked; forked.serve(int(sys.argv[1]))"


class ForkedProcess:
    """A process forked by the server, with those methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, program: str, flags: list[str], environment: dict[str, str]):
        """Start a binary, or a program given as text, with these flags and environment variables."""
        output, written = os.pipe()
        status, told = os.pipe()
        is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as under nohup
        request = json.dumps([program, flags, environment, is_ignored]).encode()
        socket.send_fds(_server()[0], [request], [written, told])
        os.close(written)
        os.close(told)
        self.stdout, self._status = os.fdopen(output), os.fdopen(status, "rb", 0)
        self.returncode: int | None = None
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """Return the exit status once there is one."""
        return self.wait() if select.select([self._status], [], [], 0)[0] else None

    def wait(self) -> int:
        """Wait for the end, and return the exit status."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
        return self.returncode

    def communicate(self) -> tuple[str, None]:
        """Wait for the end, and return what was printed since the output was last read."""
        with self.stdout:
            output = self.stdout.read()
        self.wait()
        return output, None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen]:
    """Start the process from which others are forked; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", SERVE, str(theirs.fileno())]
    options = dict(cwd=Path(__file__).parent.parent, env=os.environ | dict(JAX_PLATFORMS="cpu"))
    with theirs:
        server = subprocess.Popen(
            command, **options, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    return ours, server


def serve(descriptor: int) -> None:
    """Import what stages import, then fork a child for each request; it runs its program and returns from here."""
    from saejax.cli import all_stages

    all_stages()
    from transformers import AutoTokenizer  # noqa: F401  stages import it as they run

    with socket.socket(fileno=descriptor) as asker:
        while True:
            request, descriptors, *_ = socket.recv_fds(asker, 2**20, 2)
            if not request:  # who asked has ended
                os._exit(0)
            if os.fork() == 0:
                break
            for number in descriptors:
                os.close(number)
            with contextlib.suppress(ChildProcessError):  # those that have ended by now
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    _run(json.loads(request), *descriptors)


def _run(request: list, output: int, told: int) -> None:
    """Run a program in a child, and tell its number and, when it has ended, its status."""
    if child := os.fork():
        os.close(output)
        os.write(told, f"{child}\n".encode())
        os.write(told, f"{os.waitpid(child, 0)[1]}\n".encode())
        os._exit(0)
    os.close(told)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    program, flags, environment, is_ignored = request
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    import jax  # which has read its variables before

    jax.config.update("jax_num_cpu_devices", int(environment["JAX_NUM_CPU_DEVICES"]))
    jax.config.update("jax_enable_x64", environment.get("JAX_ENABLE_X64") == "1")
    sys.argv = [program.partition("\n")[0], *flags]
    if "\n" in program:
        exec(program, dict(__name__="__main__"))
    else:
        runpy.run_module(f"experiments.{program}", run_name="__main__")
