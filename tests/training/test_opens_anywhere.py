"""What eight devices trained opens on one with Orbax alone, by the lines of docs/artifacts.md."""

import re

import jax
import numpy as np
from runs import ROOT, finish, start
from small_stacks import batches, make_stack, run

from saejax import save_dictionary
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training.checkpoints import Checkpoints
from saejax.training.state import finish_dictionary

LINES = re.search(
    r"```python\n(import jax\nfrom orbax.*?)```", (ROOT / "docs" / "artifacts.md").read_text(), re.DOTALL
)[1]
PROGRAM = """
import sys
import numpy as np
from orbax.checkpoint import v1 as ocp
LINES
assert len(jax.devices()) == 1
np.savez(sys.argv[1], *jax.tree.leaves(state["params"]))
np.savez(sys.argv[2], **ocp.load(sys.argv[3]))
"""


def test_a_checkpoint_and_a_dictionary(tmp_path):
    stack = make_stack("batchtopk", make_mesh(MeshConfig(data=2, model=4)), auxk=0.03)
    state, _ = run(stack, batches(3))
    dictionary = finish_dictionary(stack, state, 0)
    assert len(dictionary.W_enc_DxF[...].sharding.device_set) == 8
    save_dictionary(tmp_path / "made", dictionary)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
    assert "RUN/train/topk/checkpoints" in LINES
    program = PROGRAM.replace("LINES", LINES.replace("RUN/train/topk/checkpoints", str(tmp_path / "checkpoints")))
    places = [str(tmp_path / name) for name in ("state.npz", "dictionary.npz", "made/arrays")]
    finish(start(program, places))
    for array, expected in zip(np.load(places[0]).values(), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(array, expected)
    arrays = np.load(places[1])
    assert set(arrays) == set(dictionary.arrays)
    for name, array in dictionary.arrays.items():
        np.testing.assert_array_equal(arrays[name], array)
