"""Benchmarks that nothing else runs still run."""

import importlib.util
import json
import sys

import pytest

from benchmarks import bench_attention, bench_input
from saejax.models import attention


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_input_pipeline_is_timed(monkeypatch, capsys, dtype):
    sizes = ["--rows=3000", "--d=8", "--batch=64", "--shard_rows=1024"]
    monkeypatch.setattr(sys, "argv", ["bench_input", *sizes, f"--dtype={dtype}"])
    bench_input.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 3000 and figures["pipeline, later epochs (ms)"] > 0


def test_attention_is_timed_both_ways(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_attention", "--tokens=600", "--rounds=1"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bench_attention.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["tokens"], row["gradient"]) for row in rows] == [(600, False), (600, True)]
    assert all(row["ratio"] == row["tiles"] / row["blocks"] and row["floor"] > 0 for row in rows)
    assert attention.TILES_FROM == 2048
