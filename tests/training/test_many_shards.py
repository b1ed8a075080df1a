"""A store of more shards than a process may have files open."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "activations"))
import known_store
from runs import finish, start

SHARDS, FILES = 5000, 256
TRAIN = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
from saejax.runner.config import Configs
from saejax.settings import MeshConfig, TrainConfig
from saejax.training.train import run_train
from saejax.runner.workspace import Run
settings = dict(sites=("resid_post.1",), batch=512, epochs=1, k=(2,), max_steps=8, input="streamed")
configs = Configs(MeshConfig(), TrainConfig(**settings))
run = Run("train", "topk", Path(sys.argv[2]), configs, dict(capture=Path(sys.argv[1])))
print("trained", run_train(run).steps)
"""


@pytest.mark.slow
def test_a_store_of_more_shards_than_files_may_be_open_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of 25,000 small files
    lengths = known_store.LENGTHS * (2 * SHARDS // sum(known_store.LENGTHS) + 1)
    written = known_store.write(tmp_path / "store", shard_rows=2, lengths=lengths)
    assert written.store.manifest.shards >= SHARDS
    (tmp_path / "run").mkdir()
    assert "trained 8" in finish(start(TRAIN, [str(tmp_path / "store"), str(tmp_path / "run")]))
