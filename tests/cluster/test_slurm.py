"""The batch script on a real SLURM: one and two nodes train, are preempted, and end with the same bits.

The cluster of two nodes is on this machine, in one folder: slurm-wlm and munge, as root, without systemd.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=d0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=d1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=d0,d1 PriorityTier=1 GraceTime=60 Default=YES State=UP
PartitionName=high Nodes=d0,d1 PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """What this machine lacks for a cluster."""
    return [name for name in _PROGRAMS if not shutil.which(name)] + ([] if os.getuid() == 0 else ["root"])


def free_ports(count: int) -> list[int]:
    """Ports that no one listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Slurm:
    """A cluster that runs while the block does.

    Args:
      folder: of its state and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | dict(SLURM_CONF=str(folder / "slurm.conf"))

    def __enter__(self) -> "Slurm":
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(3)
        (self.folder / "slurm.conf").write_text(_CONFIG.format(host=host, folder=self.folder, ports=ports))
        own = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self._munge_pid = own["pid"]
        self.call(
            "munged", "--force", f"--key-file={key}", f"--socket={own['socket']}", f"--pid-file={own['pid']}",
            f"--log-file={own['log']}", f"--seed-file={own['seed']}",
        )  # fmt: skip
        conf = str(self.folder / "slurm.conf")
        self.call("slurmctld", "-f", conf)
        for node in ("d0", "d1"):
            self.call("slurmd", "-N", node, "-f", conf)
        try:
            self.wait(lambda: set(self.call("sinfo", "-h", "-o", "%T").split()) == {"idle"}, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        time.sleep(2)
        subprocess.run(["scontrol", "shutdown"], env=self.environment, check=False)
        os.kill(int(self._munge_pid.read_text()), 15)

    def call(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """The number of a job that ``sbatch`` takes."""
        return self.call("sbatch", "--parsable", *arguments).strip()

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        facts = dict(part.split("=", 1) for part in self.call("scontrol", "show", "job", job).split() if "=" in part)
        return facts["JobState"]

    @staticmethod
    def wait(true: object, seconds: float) -> None:
        """Waits until a condition holds, for so many seconds at most."""
        end = time.monotonic() + seconds
        while not true():  # type: ignore[operator]
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.5)


SCRIPT = str(runs.ROOT / "launch" / "slurm.sbatch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"takes {', '.join(missing())}"),
]


# Ablation and its prompts are tested in two processes elsewhere.
ASKED = dict(
    train__kinds="topk", train__epochs=200, train__checkpoint_every=50, train__log_every=20, task__behaviours=""
)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_preempted_job_goes_on_and_ends_with_the_same_bits(inputs, tmp_path, nodes):
    whole = runs.small_flags(*inputs, tmp_path / "whole", **ASKED)
    for process in runs.start_pair("pipeline", whole) if nodes == 2 else [runs.start("pipeline", whole)]:
        runs.finish(process)
    log = tmp_path / "job.log"
    with Slurm(tmp_path / "slurm") as slurm:
        slurm.environment |= dict(SAEJAX=f"{sys.executable} -m saejax.cli")
        slurm.environment |= dict(JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
        place = [f"--chdir={runs.ROOT}", f"--nodes={nodes}", "--partition=low"]
        # The nodes' names stand for no address here.
        flags = runs.small_flags(*inputs, tmp_path / "run", **ASKED, mesh__coordinator=f"127.0.0.1:{free_ports(1)[0]}")
        job = slurm.submit(*place, f"--output={log}", SCRIPT, *flags)
        slurm.wait(lambda: log.exists() and "explained variance" in log.read_text(), 600)
        # It takes all nodes, so that the job has to leave wherever it is.
        slurm.submit(f"--chdir={runs.ROOT}", "--nodes=2", "--partition=high", "--output=/dev/null", "--wrap=sleep 3")
        slurm.wait(lambda: "run the same command to go on" in log.read_text(), 120)
        slurm.wait(lambda: slurm.state(job) == "COMPLETED", 900)
        wrong = slurm.submit(*place, "--output=/dev/null", SCRIPT, *flags, "--train.k=-1")
        slurm.wait(lambda: slurm.state(wrong) == "FAILED", 120)
    said = log.read_text()
    assert "resuming topk at step" in said and said.count("capture: started") == 1
    assert runs.checksums(tmp_path / "run") == runs.checksums(tmp_path / "whole")
