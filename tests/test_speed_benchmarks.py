"""Benchmarks that nothing else runs still run."""

import json
import sys

from benchmarks import bench_input


def test_the_input_pipeline_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_input", "--rows=3000", "--d=8", "--batch=64", "--shard_rows=1024"])
    bench_input.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 3000 and figures["pipeline, later epochs (ms)"] > 0
