"""The stage: what it prints and writes, when it refuses, and what makes it run again."""

import json
import re
import types

import pytest
import runs
from preflight_setup import CONFIGS

from saejax.preflight import checks, place
from saejax.runner import command

SHAPES = CONFIGS / "shapes"


def preflight(*flags: str) -> int:
    return command.run(["preflight"], "", ["preflight", *flags])


def listed(tmp_path, *names: str) -> list[str]:
    return [f"--workdir={tmp_path}", "--preflight.models=" + ",".join(str(SHAPES / f"{name}.json") for name in names)]


@pytest.fixture
def host(monkeypatch):
    """host(gib): makes this host's free memory so large."""

    def set_memory(gib: float) -> None:
        free = types.SimpleNamespace(available=int(gib * 2**30))
        monkeypatch.setattr(place.psutil, "virtual_memory", lambda: free)

    return set_memory


def test_a_list_of_models(tmp_path, capsys, host):
    host(8 * 200)
    assert preflight(*listed(tmp_path, "smollm2-135m", "qwen3-0.6b"), "--mesh.model=8", "--model.dtype=bfloat16") == 0
    output = capsys.readouterr().out
    rows = [re.search(r"(\S+)\.json .*: fits$", line) for line in output.splitlines()]
    assert [row[1] for row in rows if row] == ["smollm2-135m", "qwen3-0.6b"]
    assert "134.5 M  bfloat16      30" in output and "596.0 M  bfloat16      28" in output
    assert "smollm2-135m.json: 9 query heads over 8 devices: o, q are replicated" in output
    results = json.loads((tmp_path / "preflight" / "done.json").read_text())["results"]
    assert [model["parameters"] for model in results["models"]] == [134_515_008, 596_049_920]
    weights = results["models"][0]["units"]["ablate/topk"]["bytes"]["model"]
    assert weights < 2 * 134_515_008 < 8 * weights
    assert results["mesh"]["axes"] == dict(member=1, data=1, model=8) and "seconds" not in results


def test_one_model_is_planned(tmp_path, inputs, capsys):
    model, corpus = inputs
    assert preflight(*runs.small_flags(model, corpus, tmp_path)) == 0
    results = json.loads((tmp_path / "preflight" / "done.json").read_text())["results"]
    assert set(results["seconds"]) == {"baseline", "capture", "train", "evaluate", "ablate"}
    assert all(0 < seconds < 3600 for seconds in results["seconds"].values())
    assert results["documents"] == 40 and results["tokens"] > 500 and results["disk_bytes"] > 0
    assert "roughly" in capsys.readouterr().out
    assert preflight(*runs.small_flags(model, corpus, tmp_path)) == 0
    assert "done before, unchanged" in capsys.readouterr().out
    assert preflight(*runs.small_flags(model, corpus, tmp_path, preflight__prompt_tokens=9)) == 0
    assert "--preflight.prompt_tokens was 32, is 9" in capsys.readouterr().out
    assert len(list(tmp_path.glob("preflight-*/done.json"))) == 2, "the earlier results stay"


def test_a_machine_without_bfloat16(tmp_path, inputs, capsys, monkeypatch):
    model, corpus = inputs
    monkeypatch.setattr(checks.rates, "matmul_rates", lambda: dict(float32=1e11, bfloat16=5e10))
    assert preflight(*runs.small_flags(model, corpus, tmp_path, capture__dtype="bfloat16")) == 0
    output = capsys.readouterr().out
    assert "--capture.dtype=float32 would take less time" in output and "--train.matmul=float32 would" not in output


def test_what_does_not_fit(tmp_path, capsys, host):
    host(8 * 3)
    assert preflight(*listed(tmp_path, "smollm2-135m", "llama-3-8b", "phi-2"), "--train.batch=32") == 2
    captured = capsys.readouterr()
    assert "smollm2-135m.json" not in captured.err and captured.err.count("\n") == 1
    assert re.search(r"llama-3-8b.json needs about 3\d\.\d GiB per device, but there are 3\.0: use ", captured.err)
    assert "phi-2.json needs about" in captured.err and "the TPU slice v5e:2x4 with --mesh.model=" in captured.err
    assert captured.out.count(": does not fit") == 2 and captured.out.count(": fits") == 1


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--train.sites=resid_post.29", "--capture.sites=resid_post.29"],
            "qwen3-0.6b.json: there is no site resid_post.29",
        ),
        (["--train.sites=resid_post.3"], "--train.sites needs resid_post.3, which --capture.sites="),
        (["--mesh.model=3"], "make the product 8"),
        (["--train.batch=31"], "--train.batch=31 is not divisible by the 8 devices"),
        (["--train.k=10000"], "--train.k=10000 is more than the 8192 features"),
        (["--preflight.topology=v5e:9x9x9"], "--preflight.topology=v5e:9x9x9"),
    ],
)
def test_bad_input(tmp_path, capsys, host, flags, message):
    host(8 * 200)
    assert preflight(*listed(tmp_path, "qwen3-0.6b"), *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
