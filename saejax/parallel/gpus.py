"""The NVIDIA GPUs of a node, without JAX: how many there are, and which of them a process sees."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def count_gpus() -> int:
    """Return the number of GPUs of this node."""
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    # Linux on Windows has no such files.
    return count or sum(line.startswith("GPU ") for line in _list_devices())


def visible_gpus(environment: Mapping[str, str], gpus: int) -> list[str]:
    """Return the names of the GPUs that its environment lets a process see, as CUDA reads it.

    CUDA_VISIBLE_DEVICES lists numbers, or ids such as "GPU-8932f937", of which a beginning will do that no other GPU
    has. CUDA ignores what stands behind the first entry that names no GPU, such as -1, the number of one that is not
    there or an unknown id, and sees none where one is named twice, also once by its number and once by its id.

    Args:
      environment: variables of the process.
      gpus: number of GPUs of the node.

    Returns:
      Numbers and whole ids; an id as it was given where nvidia-smi does not list this node's.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(str, range(gpus)))
    ids = find_ids() if re.search("(GPU|MIG)-", visible) else []
    named: list[str] = []
    for entry in map(str.strip, visible.split(",")):
        number = re.match(r"\d+", entry)  # CUDA reads "1st" as 1
        name = str(int(number[0])) if number else _complete_id(entry, ids)
        if name is None or (number and int(name) >= gpus):
            break
        named.append(name)
    # nvidia-smi lists the GPUs in the order of CUDA's numbers, where all of a node are of one kind.
    numbers = {name: str(number) for number, name in enumerate(name for name in ids if name.startswith("GPU-"))}
    return named if len({numbers.get(name, name) for name in named}) == len(named) else []


def count_visible(environment: Mapping[str, str], gpus: int) -> int:
    """Return the number of GPUs that CUDA gives a process, of those that ``visible_gpus`` names.

    Of parts of GPUs (MIG) CUDA 12 gives a process one, however many are named.
    """
    names = visible_gpus(environment, gpus)
    return 1 if names and names[0].startswith("MIG-") else len(names)


def find_ids() -> list[str]:
    """Return the ids of this node's GPUs and of their parts (MIG), as nvidia-smi lists them; none without it."""
    return re.findall(r"UUID: ((?:GPU|MIG)-[^)\s]+)", "\n".join(_list_devices()))


def _complete_id(entry: str, ids: Sequence[str]) -> str | None:
    """Return the whole id of the one GPU, or part of one, whose id begins so; None where there is no such one."""
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    if not ids or entry.removeprefix("MIG-").partition("/")[0] in ids:  # MIG-GPU-UUID/INSTANCE/INSTANCE names a part
        return entry
    matches = [name for name in ids if name.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _list_devices() -> list[str]:
    """Return nvidia-smi's lines, such as "GPU 0: NVIDIA H100 (UUID: GPU-8932f937-...)"; none without it."""
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return listed.stdout.splitlines()
