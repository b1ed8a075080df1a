"""The NVIDIA GPUs of a node, without JAX: how many there are, and which of them a process sees."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def count_gpus() -> int:
    """Return the number of GPUs of this node."""
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if count or not shutil.which("nvidia-smi"):
        return count
    # Linux on Windows has no such files. A line is "GPU 0: NVIDIA H100 (UUID: GPU-8932f937-...)".
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def visible_gpus(environment: Mapping[str, str], gpus: int) -> list[str]:
    """Return the names of the GPUs that its environment lets a process see, as CUDA reads it.

    CUDA_VISIBLE_DEVICES lists numbers, or ids such as "GPU-8932f937". CUDA ignores what stands behind the first entry
    that names no GPU, such as -1 or the number of one that is not there.

    Args:
      environment: variables of the process.
      gpus: number of GPUs of the node.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(str, range(gpus)))
    named: list[str] = []
    for entry in map(str.strip, visible.split(",")):
        number = re.match(r"\d+", entry)  # CUDA reads "1st" as 1
        if int(number[0]) >= gpus if number else not entry.startswith(("GPU-", "MIG-")):
            break
        named.append(str(int(number[0])) if number else entry)
    return named


def count_visible(environment: Mapping[str, str], gpus: int) -> int:
    """Return the number of GPUs that CUDA gives a process, of those that ``visible_gpus`` names.

    Of parts of GPUs (MIG) CUDA 12 gives a process one, however many are named.
    """
    names = visible_gpus(environment, gpus)
    return 1 if names and names[0].startswith("MIG-") else len(names)
