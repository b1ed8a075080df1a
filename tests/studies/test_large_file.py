"""The flag file of a large job, end to end on eight devices, on a tiny random model of its family."""

import pytest
import runs
from test_configs_run import CONFIGS, SMALL, model_of, write_benchmarks

from saejax.runner import command
from saejax.runner.registry import all_stages

PATH = CONFIGS / "large" / "qwen3-4b-every-layer.flags"
LAYERS = 36
SIZES = """
--task.behaviours=capital --corpus.context=64 --capture.tokens=400 --capture.batch_tokens=256
--train.expansion=2 --train.k=8 --train.batch=128 --train.buffer_rows=512
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_dictionary_for_every_layer_ends_in_its_report(tmp_path, monkeypatch, capsys):
    """As the file says, on the mesh that it names: members over four devices, and each one's rows over two."""
    monkeypatch.chdir(CONFIGS.parent)  # files name others from there
    flags = [*SMALL.split(), *SIZES.split(), "--mesh.member=4", "--mesh.data=2"]
    flags += [f"--model.path={model_of(PATH, tmp_path / 'model', LAYERS)}"]
    flags += [f"--corpus.path={runs.save_corpus(tmp_path / 'corpus.jsonl.gz')}"]
    flags += [f"--task.path={write_benchmarks(tmp_path / 'benchmarks')}"]
    arguments = ["pipeline", f"--flagfile={PATH}", f"--workdir={tmp_path / 'run'}", runs.flag_file(flags, tmp_path)]
    assert command.run(list(all_stages()), "", arguments) == 0, capsys.readouterr().err
    for stage in ("train", "evaluate", "interpret"):
        members = {path.parent.name for path in (tmp_path / "run" / stage / "topk").glob("*/done.json")}
        assert members == {f"resid_post.{layer}" for layer in range(LAYERS)}, stage
    assert "Explained variance" in (tmp_path / "run" / "report" / "index.html").read_text()
