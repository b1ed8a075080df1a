"""The files of launch/ start commands that saejax understands, all with one configuration.

What the TPU script does with slices is played by a ``gcloud`` that answers with states from a file.
"""

import os
import re
import shlex
import subprocess

import pytest
import runs
import yaml

from saejax.parallel.settings import MeshConfig
from saejax.runner import command_line

LAUNCH = runs.ROOT / "launch"
FLAGS = "--flagfile=configs/qwen3-4b-math.flags"
NODE = dict(SKYPILOT_NUM_NODES="4", SKYPILOT_NODE_RANK="2", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2")


GCLOUD = """#!/bin/bash
case "$*" in
  *describe*) state=$(head -n 1 states); sed -i 1d states; [ "$state" ] || exit 1; echo "$state" ;;
  *) printf '%s\\n' "$4 ${*: -1}" >> said; [[ -z "$FAILS" || "$*" != *$FAILS* ]] ;;
esac
"""


def dry_run(script):
    command = ["bash", str(LAUNCH / script), "--dry-run", "--workdir=/shared/a run", FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(NAME="a b"), check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def of_slurm():
    (words,) = dry_run("slurm.sbatch")
    assert words[:4] == ["srun", "--kill-on-bad-exit=1", "bash", "-c"]
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
    shown = re.sub(r"^\.venv/bin/saejax pipeline", "printf '%s\\\\n' saejax pipeline", script)
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, env=os.environ | NODE, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("of_file", [of_slurm, of_tpu_vm, of_jobset, of_skypilot])
def test_its_command_has_flags_that_there_are(of_file, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    program, stage, *flags = of_file()
    assert program.endswith("saejax") and stage == "pipeline" and FLAGS in flags
    read = command_line.stage_flags()
    configs = command_line.read_configs(read, [program, *flags])
    assert command_line.named_workdir(read) == ("/shared/a run" if of_file in (of_slurm, of_tpu_vm) else "/shared/run")
    mesh = configs[MeshConfig]
    if of_file is of_skypilot:
        assert (mesh.processes, mesh.process_id, mesh.coordinator) == (4, 2, "10.0.0.1:8476")
    else:
        assert mesh.distributed == "auto"


@pytest.fixture
def tpu_vm(tmp_path):
    """A function that runs the TPU script where the slice has some states, one after the other.

    It gives the status, what the script said, and what the script asked for: a word of each and its last argument.
    """

    def run(*states, fails=""):
        for name, text in (("gcloud", GCLOUD), ("sleep", "#!/bin/bash\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "said").write_text("")
        environment = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", MORE="--spot", FAILS=fails)
        command = ["bash", str(LAUNCH / "tpu_vm.sh"), "--workdir=x y"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return done.returncode, done.stderr, (tmp_path / "said").read_text().splitlines()

    return run


def test_a_slice_is_asked_for_waited_for_and_used_unless_it_is_lost(tpu_vm):
    status, _, asked = tpu_vm("", "PROVISIONING", "PROVISIONING", "ACTIVE")
    assert status == 0 and [line.split()[0] for line in asked] == ["create", "ssh", "scp", "ssh", "ssh"]
    assert asked[0] == "create --spot" and ".[tpu]" in asked[3]
    assert asked[4].endswith(r"saejax pipeline --mesh.distributed=auto --workdir=x\ y ")
    assert [line.split()[0] for line in tpu_vm("ACTIVE", "ACTIVE")[2]] == ["ssh", "scp", "ssh", "ssh"]
    status, said, asked = tpu_vm(*["SUSPENDED"] * 4)
    assert status == 1 and "the slice saejax is SUSPENDED: delete it" in said and not asked
    for fails, asked in (("pip install", 3), ("saejax pipeline", 4)):  # nothing runs without its packages
        status, _, told = tpu_vm("ACTIVE", "ACTIVE", fails=fails)
        assert (status, len(told)) == (1, asked)


def test_the_hosts_python_may_be_named(monkeypatch):
    for named in ("", "python3.12"):
        monkeypatch.setenv("PYTHON", named)
        installed = dry_run("tpu_vm.sh")[-2][-1]
        assert installed.startswith(f"cd saejax && {named or 'python3'} -m venv .venv")
