"""The program: an address that works, one line for bad input, and an end that leaves nothing."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from made_up_documents import made_up_document

from saejax.attribution.forms.neuronpedia import write_graph
from saejax.serving import run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path):
    write_graph(tmp_path / "graphs", made_up_document(features=8, edges=12, layers=3))
    return tmp_path


def test_it_serves_this_machine_alone_until_it_is_stopped(folder):
    command = [sys.executable, "-m", "experiments.serve", str(folder), "--port=0"]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | dict(JAX_PLATFORMS="cpu"), **streams) as process:
        try:
            line = process.stdout.readline()
            address, port = re.search(r"1 graph: open (http://127\.0\.0\.1:(\d+)/[\w-]{32}/) ", line).groups()
            connections = psutil.Process(process.pid).net_connections()
            assert [one.laddr.ip for one in connections if one.status == "LISTEN"] == ["127.0.0.1"]
            page, local = address.partition(port)[2], f"[::1]:{port}"  # as a tunnel's end of this port may be called
            for path, status, host in ((page, 200, f"127.0.0.1:{port}"), (page, 200, local), ("/", 403, local)):
                connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=300)
                connection.request("GET", path, headers=dict(host=host))
                assert connection.getresponse().status == status
                connection.close()
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and errors == "serve: stopped\n"
    assert address not in rest and not children


def test_bad_input_is_one_line(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, said in (
            ([], "--workdir=DIR is missing"),
            (["--workdir=/nowhere/at/all"], "there is no folder /nowhere/at/all"),
            ([str(folder / "graphs" / "made-up.json")], "there is no folder"),
            ([str(tmp_path / "empty"), "--port=0"], "holds no graphs: expected a workdir"),
            ([f"--workdir={folder}", f"--port={port}"], f"--port={port} of 127.0.0.1 cannot be used (Address already"),
            ([f"--workdir={folder}", f"--port={port}", "--hosts=[::1]:9000,a.org"], "cannot be used (Address already"),
            (
                [f"--workdir={folder}", "--hosts=http://a.org/"],
                "--hosts=http://a.org/: expected a name as in an address",
            ),
            ([f"--workdir={folder}", "--hosts=::1"], "--hosts=::1: expected a name as in an address"),
            ([f"--workdir={folder}", "--port=99999"], "port"),
            ([f"--workdir={folder}", "--portt=x"], "Unknown command line flag 'portt'"),
            ([str(folder), "more"], "'more' is not a flag"),
        ):
            assert run.run(["serve", *words]) == 2, words
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run.run(["serve", f"--workdir={folder}"]) == 2
    assert "needs starlette, which is not installed: pip install -e '.[serve]'" in capsys.readouterr().err
