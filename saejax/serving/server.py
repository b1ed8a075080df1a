"""Runs the server until it is stopped."""

import contextlib
import socket
from pathlib import Path
from typing import Any

import uvicorn

from saejax.errors import UserError
from saejax.runner.config import Configs
from saejax.serving.app import GraphServer
from saejax.serving.guard import Guard
from saejax.serving.jobs import Jobs
from saejax.serving.session import ModelSession
from saejax.serving.store import GraphStore

_GRACE = 5  # seconds for answers that are under way when the server is to end


class StoppingServer(uvicorn.Server):
    """A server that stops its work before it waits for answers to end.

    Args:
      config: of uvicorn.
    """

    def __init__(self, config: uvicorn.Config, jobs: Jobs):
        super().__init__(config)
        self._jobs = jobs

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop all work, then the server."""
        self._jobs.stop()
        super().handle_exit(sig, frame)


def serve(
    folder: Path, configs: Configs, named: bool, labels: Path | None, token: str, listening: socket.socket
) -> None:
    """Answer requests until the process is stopped.

    Args:
      folder: folder with the graphs.
      configs: configuration of the model and the dictionaries.
      named: whether it names a set of dictionaries, which is then used for all graphs.
      labels: a file of labels; None: a file in the folder.
      token: secret first part of the address.
      listening: a socket of 127.0.0.1.

    Raises:
      UserError: there is no graph, and no model and dictionaries to trace one with.
    """
    store, jobs = GraphStore(folder, labels), Jobs()
    graphs = len(store.graphs())
    if not graphs and not named:
        raise UserError(
            f"{folder} holds no graphs: expected a workdir in which experiments.attribute made some, or graphs in "
            "Neuronpedia's format; to make the first here, name --model.path=MODEL --graph.transcoders=SET"
        )
    port = listening.getsockname()[1]
    server = make_server(store, ModelSession(configs, named), jobs, token, port)
    count = "1 graph" if graphs == 1 else f"{graphs} graphs"
    print(f"{count}: open http://127.0.0.1:{port}/{token}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(jobs):
        server.run(sockets=[listening])


def make_server(store: GraphStore, session: ModelSession, jobs: Jobs, token: str, port: int) -> StoppingServer:
    """Return the server, which is not running yet.

    Args:
      store: the graphs.
      session: the model and what it runs.
      jobs: the work in progress.
      token: in the address.
      port: of the address.
    """
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    config = uvicorn.Config(
        Guard(GraphServer(store, session, jobs).application(), token, hosts),
        http="h11",  # says when a reader has left, on which work ends
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,  # addresses have the token
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    return StoppingServer(config, jobs)
