"""How much memory graphs take: by formulas written out here, how many tokens fit, and what is refused."""

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from made_graphs import IDS, make_transcoders

from saejax import trace
from saejax.attribution.local.dictionaries import READ_AT_ONCE
from saejax.attribution.local.model import LocalModel
from saejax.attribution.trace import prompt
from saejax.attribution.trace.prompt import GraphSize, Memory, certain_active, check_memory, estimate_memory
from saejax.dictionaries import DictionaryConfig
from saejax.errors import UserError
from saejax.parallel.mesh import AXES


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture
def large(tiny) -> GraphSize:
    """A graph in whose sizes nothing is small: 24 layers, 160,000 features."""
    model = dataclasses.replace(tiny.config, n_layers=24, d_model=2048, n_heads=16, d_head=128, context=32_768)
    transcoder = DictionaryConfig(kind="standard", d_in=2048, n_features=160_000)
    return GraphSize(model, transcoder, active=50, max_features=4096)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    def taken() -> int:
        """Pages of this process that are in memory."""
        return int(Path("/proc/self/statm").read_text().split()[1])

    pieces = [bytes(4000) for _ in range(40_000)]
    left = pieces[::200]  # between which the C library keeps what is free
    pieces.clear()
    before = taken()
    prompt.return_freed()
    # Half: in a process that did much before, pieces lie in holes of pages that hold something else, too.
    assert before - taken() > 0.5 * 40_000 * 4000 / os.sysconf("SC_PAGE_SIZE") and left


def test_a_trace_gives_memory_back_before_each_phase_and_after_each_round(tiny, monkeypatch):
    calls = list[int]()
    monkeypatch.setattr(prompt, "return_freed", lambda: calls.append(1))
    trace(tiny, make_transcoders(tiny.config, "standard"), IDS, max_features=8)
    # Of eight features two get rows in each of four rounds.
    assert len(calls) == prompt.PHASES + 1 + 4


def test_the_largest_arrays_are_counted(large, one_device):
    tokens = 1024
    need = estimate_memory(large, tokens, one_device)
    directions = 50 * 24 * (tokens - 1) * 2048 * 4
    assert directions < need.device < 2.5 * directions
    columns = prompt._LEAST + 24 * (tokens + 2) + tokens
    rows = (4096 + 10) * columns * 4 + prompt.WHOLE * 4  # the whole ones and what becomes of them
    some = 4 * READ_AT_ONCE  # of the directions, as they come
    whole = 2 * 2048 * 160_000 * 4  # a transcoder that is read, which is more
    assert rows + some + prompt._PROGRAMS < need.host < 1.2 * max(rows + some, whole) + prompt._PROGRAMS
    # Of a short prompt the encoders are the largest.
    encoders, acts = 2 * 2048 * 160_000 * 4, 3 * 8 * 160_000 * 4
    short = estimate_memory(dataclasses.replace(large, active=1), 8, one_device)
    assert encoders + acts < short.device < 1.2 * (encoders + acts)
    # All features need the square, and no copy.
    every = dataclasses.replace(large, max_features=None, active=2)
    host = estimate_memory(every, 1024, one_device).host
    assert 1 < host / (4 * (2 * 24 * 1023) ** 2) < 2


def test_as_many_tokens_fit_as_memory_allows(large, one_device, monkeypatch):
    free = Memory(0, sum(estimate_memory(large, 700, one_device)))
    monkeypatch.setattr(prompt, "free_memory", lambda mesh: free)
    with pytest.raises(UserError, match="^about [0-9]{3} tokens fit into .* and the prompt has 9,999 tokens") as error:
        check_memory(large, 9999, one_device)
    most = int(str(error.value).split()[1])
    assert 700 <= most < 700 + 64  # up to the length to which 700 tokens are padded, and about that many bytes
    assert estimate_memory(large, most, one_device).fits(free, one_device)
    assert not estimate_memory(large, most + 1, one_device).fits(free, one_device)
    check_memory(large, most, one_device)
    monkeypatch.setattr(prompt, "free_memory", lambda mesh: Memory(0, 0))
    with pytest.raises(UserError, match="^no prompt fits into the memory that is free, 0.0 GiB"):
        check_memory(large, 5, one_device)


def test_devices_of_a_host_share_its_memory_and_others_have_their_own(one_device):
    eight = Mesh(np.array(jax.devices()).reshape(1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    need = Memory(100, 50)
    assert need.fits(Memory(0, 150), one_device) and not need.fits(Memory(0, 149), one_device)
    assert need.fits(Memory(0, 850), eight) and not need.fits(Memory(0, 849), eight)

    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), size=1)
    assert need.fits(Memory(100, 50), gpu) and not need.fits(Memory(99, 1000), gpu)
    assert not need.fits(Memory(1000, 49), gpu)


def test_a_prompt_that_does_not_fit_is_refused_before_a_layer_is_run(tiny, one_device, monkeypatch):
    made = make_transcoders(tiny.config, "topk")
    assert certain_active(made[0].config) == 6 and certain_active(make_transcoders(tiny.config)[0].config) == 0
    free = Memory(0, sum(estimate_memory(GraphSize(tiny.config, made[0].config, 6.0), 30, one_device)))
    monkeypatch.setattr(prompt, "free_memory", lambda mesh: free)
    monkeypatch.setattr(prompt, "LocalModel", lambda *arguments: pytest.fail("a layer was run"))
    with pytest.raises(UserError, match=r"^about 3\d tokens fit into .* has 60 tokens") as error:
        trace(tiny, made, [0] * 60)
    assert "\n" not in str(error.value)


def test_more_active_features_than_fit_are_refused_before_rows(tiny, one_device, monkeypatch):
    """Of ReLU transcoders it is known only after the layers have run."""
    made = make_transcoders(tiny.config)
    ran = []

    def shrink(*arguments):
        ran.append(LocalModel(*arguments))
        monkeypatch.setattr(prompt, "free_memory", lambda mesh: Memory(0, prompt._PROGRAMS + 100_000))
        return ran[0]

    monkeypatch.setattr(prompt, "LocalModel", shrink)
    monkeypatch.setattr(prompt, "attribute_in_rounds", lambda *arguments: pytest.fail("a row was made"))
    with pytest.raises(UserError, match=r"has 7 tokens, whose graph would take 0\.4 GiB: shorten it, or"):
        trace(tiny, made, IDS)
    assert len(ran[0].active)
