"""Benchmarks that nothing else runs still run."""

import json
import sys

import pytest

from benchmarks import bench_input


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_input_pipeline_is_timed(monkeypatch, capsys, dtype):
    sizes = ["--rows=3000", "--d=8", "--batch=64", "--shard_rows=1024"]
    monkeypatch.setattr(sys, "argv", ["bench_input", *sizes, f"--dtype={dtype}"])
    bench_input.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 3000 and figures["pipeline, later epochs (ms)"] > 0
