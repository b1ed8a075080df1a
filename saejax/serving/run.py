"""The binary ``serve``: the attribution graphs of a folder as living pages, for this machine alone."""

import importlib.util
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from saejax.attribution.settings import GraphConfig
from saejax.errors import Interrupted, UserError
from saejax.runner import command, command_line
from saejax.runner.flag_files import FileLine

ABOUT = """\
serve: shows the attribution graphs of a folder in a browser on this machine, and works on them: traces prompts, prunes
again, runs the model with features changed, saves labels, pins and groups.

  serve DIR or --workdir=DIR  a workdir, or a folder of graphs in Neuronpedia's format (required)
  --port=N  of 127.0.0.1; 0: a free one (default: 8765)
  --hosts=HOST,HOST  further names in addresses that lead here through a tunnel or a proxy, with their ports, such as
      localhost:9000 or hub.example.org (default: none)
  --debug  also show the traceback of bad input

With --model.path=MODEL and --graph.transcoders=SET, and other flags of experiments.attribute, these go for all graphs;
else each graph's own are taken from its unit. It answers at an address with a random token, and ends with Ctrl-C."""


def run(argv: Sequence[str]) -> int:
    """Run the binary and return its exit status."""
    flag_values = command_line.stage_flags()
    flags.DEFINE_integer("port", 8765, "", lower_bound=0, upper_bound=65535, flag_values=flag_values)
    flags.DEFINE_list("hosts", [], "", flag_values=flag_values)
    program, *rest = argv
    first = next((number for number, argument in enumerate(rest) if not isinstance(argument, FileLine)), None)
    if first is not None and not rest[first].startswith("-"):
        rest[first] = f"--workdir={rest[first]}"

    def work() -> None:
        configs = command_line.read_configs(flag_values, [program, *rest], ["attribute"])
        if flag_values["help"].value:
            return command.show_text(ABOUT)
        folder = flag_values["workdir"].value
        if not folder:
            raise UserError("--workdir=DIR is missing: name a workdir, or a folder of graphs")
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}: expected a workdir, or a folder of graphs")
        for package in ("starlette", "uvicorn"):
            if not importlib.util.find_spec(package):
                raise UserError(f"experiments.serve needs {package}, which is not installed: pip install -e '.[serve]'")
        hosts = flag_values["hosts"].value or []
        if wrong := [
            host for host in hosts if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?", host)
        ]:
            raise UserError(f"--hosts={wrong[0]}: expected a name as in an address, such as localhost:9000")
        token, listening = secrets.token_urlsafe(24), _listen(int(flag_values["port"].value or 0))
        stopped = command.install_signal_handlers()
        named = bool(configs[GraphConfig].transcoders or configs[GraphConfig].dictionaries)
        from saejax.serving.app import serve

        serve(Path(folder), configs, named, token, listening, hosts)
        if stopped():
            raise Interrupted("serve: stopped")

    return command.run_and_report(work, flag_values)


def _listen(port: int) -> socket.socket:
    """Return a socket of this machine alone.

    Raises:
      UserError: the port is taken, or may not be used.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left may be taken again
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(f"--port={port} of 127.0.0.1 cannot be used ({error.strerror}): name another, or 0") from None
    return listening
