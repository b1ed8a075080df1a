"""The files of launch/ start commands that saejax understands, all with one configuration."""

import os
import re
import shlex
import subprocess

import pytest
import runs
import yaml

from saejax import command

LAUNCH = runs.ROOT / "launch"
FLAGS = "--flagfile=configs/qwen3-4b-math.flags"
NODE = dict(SKYPILOT_NUM_NODES="4", SKYPILOT_NODE_RANK="2", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2")


def dry_run(script):
    given = ["bash", str(LAUNCH / script), "--dry-run", "--workdir=/shared/run", FLAGS]
    done = subprocess.run(given, capture_output=True, text=True, env=os.environ | dict(NAME="a b"), check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def of_slurm():
    (words,) = dry_run("slurm.sbatch")
    return words[words.index("saejax") + 1 :]


def of_tpu_vm():
    *before, last = dry_run("tpu_vm.sh")
    assert all("a b" in words or "a b:saejax/" in words for words in [*before, last])  # one slice, by its name
    assert [words[4] for words in before] == ["create", "ssh", "scp", "ssh"]
    assert "--worker=all" in last
    return shlex.split(last[-1])[3:]


def of_jobset():
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert spec["parallelism"] == spec["completions"] == int(topology[0]) * int(topology[1]) // chips
    # What a person has to mend ends the job; a stop or a lost host starts it again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == dict(containerName=container["name"], operator="In", values=[1, 2])
    return [*container["command"], *container["args"]]


def of_skypilot():
    script = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    shown = re.sub(r"^\.venv/bin/saejax-pipeline", "printf '%s\\\\n' saejax-pipeline", script)
    return subprocess.run(
        ["bash", "-c", shown], capture_output=True, text=True, env=os.environ | NODE, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("of_file", [of_slurm, of_tpu_vm, of_jobset, of_skypilot])
def test_its_command_has_flags_that_there_are(of_file, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    program, *flags = of_file()
    assert program.endswith("saejax-pipeline") and FLAGS in flags
    read = command.stage_flags()
    configs = command.read_configs(read, [program, *flags])
    assert command.named_workdir(read) == "/shared/run"
    mesh = configs["mesh"]
    if of_file is of_skypilot:
        assert (mesh.processes, mesh.process_id, mesh.coordinator) == (4, 2, "10.0.0.1:8476")
    else:
        assert mesh.distributed == "auto"
