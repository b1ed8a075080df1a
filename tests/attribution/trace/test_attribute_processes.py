"""Two processes trace as one does."""

import json

import numpy as np
import pytest
import runs
from made_transcoders import made_set
from torch_sites import relative_error

from saejax import save_transcoders
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE
from saejax.runner import command

BARE = ("--graph.node_threshold=1", "--graph.edge_threshold=1")
CHECKED = (*BARE, "--graph.doubled=8", "--graph.circuits", "--graph.heads")


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        (dict(data=2), BARE),
        pytest.param(dict(data=2), CHECKED, marks=pytest.mark.slow),
        pytest.param(dict(model=2), CHECKED, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("two_devices")
def test_two_processes_trace_as_one(tiny_llama, lm, tmp_path, mesh, settings):
    save_transcoders(tmp_path / "set", made_set(lm, skip=True))
    (tmp_path / "ids.jsonl").write_text('{"slug": "ids", "token_ids": [5, 17, 33, 8]}')
    flags = [f"--model.path={tiny_llama}", f"--graph.transcoders={tmp_path / 'set'}"]
    flags += [f"--graph.prompts={tmp_path / 'ids.jsonl'}", "--graph.max_logits=3", *settings]
    assert command.run(["attribute"], "", ["attribute", *flags, f"--workdir={tmp_path / 'one'}"]) == 0
    both = [*flags, f"--workdir={tmp_path / 'two'}", *(f"--mesh.{axis}={size}" for axis, size in mesh.items())]
    for process in runs.start_pair("attribute", both):
        runs.finish(process)
    folders = [tmp_path / name / "attribute" / "ids" for name in ("one", "two")]
    one, two = (Graph.load(folder / "ids-graph") for folder in folders)
    assert np.array_equal(one.nodes.index_N, two.nodes.index_N) and one.count(FEATURE) > 20
    assert relative_error(two.adjacency_RxS, one.adjacency_RxS) < 1e-5
    one, two = (json.loads((folder / "ids.json").read_text()) for folder in folders)
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-6)
    if settings == BARE:
        return
    assert two["doubling"]["held_error"] < 1e-4
    np.testing.assert_allclose(two["circuits"]["readout"], one["circuits"]["readout"], atol=1e-4)
    assert one["heads"]["edges"] == two["heads"]["edges"] > 0
