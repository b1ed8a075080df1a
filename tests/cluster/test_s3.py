"""A workdir on an S3 server: killed, gone on with on another machine, evaluated and reported from there."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import runs
from slurm import free_ports

from saejax.buckets.bucket import Bucket

SERVER = runs.ROOT / "build" / "moto" / "bin" / "moto_server"  # by `make test-buckets`
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SERVER.exists(), reason="takes `make test-buckets`")]
_FAST = (
    "import sys, saejax.buckets.lease as lease, saejax.buckets.mirror as mirror; from saejax import experiments; "
    "lease._BEAT, lease._DEAD, lease._LOOK_EVERY, mirror._EVERY = 0.5, 5, 0.5, 0.2; "
    "getattr(experiments, sys.argv.pop(1))()"
)


@pytest.fixture(scope="module")
def server():
    """An address with a bucket "runs", and variables for clients."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = subprocess.Popen([SERVER, "-H", "127.0.0.1", "-p", url.rpartition(":")[2]], **silent)
    for _ in range(300):
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(urllib.request.Request(f"{url}/runs", method="PUT"))
            break
        time.sleep(0.2)
    keys = dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_REGION="us-east-1", AWS_ENDPOINT_URL=url)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        yield url
    own.kill()
    own.wait()


def start(binary: str, flags: list[str], **environment: str) -> subprocess.Popen:
    variables = os.environ | dict(JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1") | environment
    command = [sys.executable, "-c", _FAST, binary, *flags]
    return subprocess.Popen(
        command, cwd=runs.ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_run_is_killed_and_another_machine_ends_with_the_same_bits(server, inputs, tmp_path):
    small = dict(train__kinds="topk", train__epochs=300, train__checkpoint_every=25, train__log_every=50)
    small |= dict(task__behaviours="", task__benchmarks="", corpus__behaviours=False, evaluate__ce_documents=1)
    local = runs.small_flags(*inputs, tmp_path / "local", **small)
    flags = runs.small_flags(*inputs, "s3://runs/a run", **small)
    for binary in ("capture", "train"):
        runs.finish(start(binary, local))
    one = [*flags, f"--scratch={tmp_path / 'one'}"]
    runs.finish(start("capture", one))
    killed, found = start("train", one), {}
    while not any(name.endswith("/commit_success.txt") for name in found) and killed.poll() is None:
        time.sleep(0.2)
        found = json.loads(Bucket("s3://runs/a run").read(".files.json").content)["files"]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    two = [*flags, f"--scratch={tmp_path / 'two'}"]
    refused = runs.finish(start("train", two), status=2)
    assert "in use by process" in refused and "--break_lock" in refused
    said = runs.finish(start("train", [*two, "--break_lock"]))
    assert "no sign of life" in said, said
    assert "resuming topk at step" in said, said
    assert runs.checksums(tmp_path / "two") == runs.checksums(tmp_path / "local")
    three = [*flags, f"--scratch={tmp_path / 'three'}"]
    for binary in ("evaluate", "baseline", "report"):
        runs.finish(start(binary, three))
    page = Bucket("s3://runs/a run").read("report/index.html").content
    assert page == (tmp_path / "three/report/index.html").read_bytes() and b"topk" in page
    shutil.rmtree(tmp_path / "three")
    assert "report: done before, unchanged" in runs.finish(start("report", three))


def test_buckets_that_cannot_be_used(server, tmp_path):
    def refused(url: str, **environment: str) -> str:
        flags = [f"--workdir={url}", f"--scratch={tmp_path / 'scratch'}"]
        line = runs.finish(start("baseline", flags, **environment), status=2).strip()
        assert line.startswith("error: ") and "\n" not in line
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        return line

    assert "no such bucket" in refused("s3://nowhere/a")
    assert "it failed" in refused("s3://runs/a", AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_ports(1)[0]}")
    _allow(server, 0)
    try:
        assert "permission denied" in refused("s3://runs/a")
    finally:
        _allow(server, 10**9)


def _allow(server: str, calls: int) -> None:
    """Has the server ask for credentials that it knows, of which there are none, after so many calls."""
    plain = {"Content-Type": "text/plain"}
    address = f"{server}/moto-api/reset-auth"
    urllib.request.urlopen(urllib.request.Request(address, data=str(calls).encode(), headers=plain, method="POST"))
