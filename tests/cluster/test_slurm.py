"""The batch script on a real SLURM: two nodes train together, are preempted, and end with the same bits."""

import sys

import pytest
import runs
from slurm import Slurm, free_ports, missing

SCRIPT = str(runs.ROOT / "launch" / "slurm.sbatch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"takes {', '.join(missing())}"),
]


def test_a_preempted_job_of_two_nodes_goes_on_and_ends_with_the_same_bits(inputs, tmp_path):
    asked = dict(train__kinds="topk", train__epochs=200, train__checkpoint_every=50, train__log_every=20)
    for process in runs.start_pair("pipeline", runs.small_flags(*inputs, tmp_path / "whole", **asked)):
        runs.finish(process)
    log = tmp_path / "job.log"
    with Slurm(tmp_path / "slurm") as slurm:
        slurm.environment |= dict(SAEJAX=f"{sys.executable} -m experiments.pipeline")
        slurm.environment |= dict(JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
        place = [f"--chdir={runs.ROOT}", "--nodes=2"]
        # The nodes' names stand for no address here.
        flags = runs.small_flags(*inputs, tmp_path / "run", **asked, mesh__coordinator=f"127.0.0.1:{free_ports(1)[0]}")
        job = slurm.submit(*place, "--partition=low", f"--output={log}", SCRIPT, *flags)
        slurm.wait(lambda: log.exists() and "explained variance" in log.read_text(), 600)
        slurm.submit(*place, "--partition=high", "--output=/dev/null", "--wrap=sleep 3")
        slurm.wait(lambda: "run the same command to go on" in log.read_text(), 120)
        slurm.wait(lambda: slurm.state(job) == "COMPLETED", 900)
        wrong = slurm.submit(*place, "--partition=low", "--output=/dev/null", SCRIPT, *flags, "--train.k=-1")
        slurm.wait(lambda: slurm.state(wrong) == "FAILED", 120)
    said = log.read_text()
    assert "resuming topk at step" in said and said.count("capture: started") == 1
    assert runs.checksums(tmp_path / "run") == runs.checksums(tmp_path / "whole")
