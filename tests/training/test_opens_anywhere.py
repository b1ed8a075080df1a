"""What eight devices trained opens on one with Orbax alone, by the lines of docs/artifacts.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import ROOT
from small_stacks import batches, make_stack, run

from saejax import save_dictionary
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training.checkpoints import Checkpoints
from saejax.training.state import finish_dictionary

LINES = re.search(
    r"```python\n(import jax\nfrom orbax.*?)```", (ROOT / "docs" / "artifacts.md").read_text(), re.DOTALL
)[1]


@pytest.fixture(scope="module")
def trained():
    """A stack on eight devices after three steps."""
    stack = make_stack("batchtopk", make_mesh(MeshConfig(data=2, model=4)), auxk=0.03)
    return stack, run(stack, batches(3))[0]


def on_one_device(program: str, *arguments: Path) -> None:
    """Runs a program in a process with one device."""
    variables = os.environ | dict(JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", f"import jax\nassert len(jax.devices()) == 1\n{program}", *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_dictionary(trained, tmp_path):
    dictionary = finish_dictionary(*trained, 0)
    assert len(dictionary.W_enc_DxF[...].sharding.device_set) == 8
    save_dictionary(tmp_path / "made", dictionary)
    program = "import sys, numpy as np\nfrom orbax.checkpoint import v1 as ocp\nmade = ocp.load(sys.argv[1])"
    on_one_device(f"{program}\nnp.savez(sys.argv[2], **made)", tmp_path / "made" / "arrays", tmp_path / "read.npz")
    read = np.load(tmp_path / "read.npz")
    assert set(read) == set(dictionary.arrays)
    for name, array in dictionary.arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_a_checkpoint(trained, tmp_path):
    _, state = trained
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
    assert "RUN/train/topk/checkpoints" in LINES
    program = LINES.replace("RUN/train/topk/checkpoints", str(tmp_path / "checkpoints"))
    save = "import sys, numpy as np\nnp.savez(sys.argv[1], *jax.tree.leaves(state['params']))"
    on_one_device(f"{program}\n{save}", tmp_path / "read.npz")
    read = np.load(tmp_path / "read.npz")
    for array, expected in zip(read.values(), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(array, expected)
