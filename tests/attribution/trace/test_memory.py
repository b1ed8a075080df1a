"""How much memory graphs take: by formulas written out here, how many tokens fit, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from made_graphs import load_tiny, make_transcoders

from saejax import trace
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.trace import memory, room, row_store
from saejax.attribution.trace import prompt as attribute
from saejax.attribution.trace.directions import READ_AT_ONCE
from saejax.attribution.trace.memory import GraphSize, certain_active, graph_bytes
from saejax.attribution.trace.room import Room, check_room, fitting_tokens
from saejax.dictionaries import DictionaryConfig
from saejax.errors import UserError
from saejax.parallel.mesh import AXES

IDS = [0, 17, 230, 5, 42, 99, 7]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, one_device):
    return load_tiny(tmp_path_factory.mktemp("model"), "llama", one_device, num_hidden_layers=2)


@pytest.fixture
def large(tiny) -> GraphSize:
    """A graph in whose sizes nothing is small: 24 layers, 160,000 features."""
    model = dataclasses.replace(tiny.config, n_layers=24, d_model=2048, n_heads=16, d_head=128, context=32_768)
    transcoder = DictionaryConfig(kind="standard", d_in=2048, n_features=160_000)
    return GraphSize(model, transcoder, active=50, max_features=4096)


def test_the_largest_arrays_are_counted(large, one_device):
    tokens = 1024
    needs = graph_bytes(dataclasses.replace(large, checked=True), tokens, one_device)
    transcoders = 2 * (2 * 2048 * 160_000 + 160_000 + 2048) * 4
    streams = 2 * 24 * tokens * 2048 * 4
    acts = 2**26 * 4  # of a part of the positions
    assert transcoders + streams + 3 * acts < needs["layers"].device < 1.5 * (transcoders + streams + 3 * acts)
    active = 50 * 24 * (tokens - 1)
    columns = row_store._LEAST + 24 * (tokens + 2) + tokens
    rows = (4096 + 10) * columns * 4 + row_store.WHOLE * 4  # the whole ones and what becomes of them
    directions = active * 2048 * 4
    some = 4 * READ_AT_ONCE  # of the directions, as they come
    assert rows + some + memory._PROGRAMS < needs["rows"].host < 1.2 * (rows + some) + memory._PROGRAMS
    assert directions < needs["rows"].device < 2.5 * directions
    # A part of the graph runs at all positions at once.
    assert transcoders + 3 * 160_000 * tokens * 4 < needs["checks"].device


def test_all_features_need_the_square_and_no_copy(large, one_device):
    every = dataclasses.replace(large, max_features=None, active=2)
    host = graph_bytes(every, 1024, one_device)["rows"].host
    assert 1 < host / (4 * (2 * 24 * 1023) ** 2) < 2


def test_heads_of_edges_take_what_one_block_does(large, one_device):
    """Of any number of sources: 16 at a time of 1,024 positions, kept in all layers; two blocks go side by side."""
    wide = dataclasses.replace(large, heads=True, model=dataclasses.replace(large.model, n_kv_heads=4))
    need = graph_bytes(wide, 1024, one_device)["heads"]
    values, mixed = 16 * 1024 * 24 * 4 * 128 * 4, 2 * 16 * 1024 * 2048 * 4
    streams, weights = 2 * 24 * 1024 * 2048 * 4, 2 * 16 * 1024**2 * 4
    assert values + mixed + streams + weights < need.device < 3 * (values + mixed + streams + weights)
    assert "heads" not in graph_bytes(large, 1024, one_device)
    free = Room(0, need.device // 2)
    with pytest.raises(UserError, match="leave the heads out"):
        check_room(
            dataclasses.replace(
                wide,
                active=0.01,
                max_features=1,
                transcoder=DictionaryConfig(kind="topk", d_in=2048, n_features=8, k=1),
            ),
            1024,
            one_device,
            free,
        )


def test_memory_grows_with_what_it_is_made_of(large, one_device):
    def rows(**changes):
        return sum(graph_bytes(dataclasses.replace(large, **changes), 512, one_device)["rows"])

    wider = dataclasses.replace(large.transcoder, n_features=640_000)
    for changes in (dict(active=100), dict(max_features=8192), dict(transcoder=wider, active=100)):
        assert rows(**changes) > rows(), changes
    layers, wide_layers = (
        graph_bytes(of, 512, one_device)["layers"] for of in (large, dataclasses.replace(large, transcoder=wider))
    )
    assert wide_layers.device > 3 * layers.device and wide_layers.host > 3 * layers.host
    assert "checks" not in graph_bytes(large, 512, one_device)
    for less, more in ((64, 512), (512, 4096)):
        one, two = (graph_bytes(large, tokens, one_device) for tokens in (less, more))
        assert all(two[name].device > one[name].device for name in one)


def test_as_many_tokens_fit_as_memory_allows(large, one_device):
    need = graph_bytes(large, 700, one_device)
    free = Room(0, max(map(sum, need.values())))
    most = fitting_tokens(large, one_device, free)
    assert 700 <= most < 700 + 64  # up to the length to which 700 tokens are padded, and about that many bytes
    assert all(free.holds(part, one_device) for part in graph_bytes(large, most, one_device).values())
    assert not all(free.holds(part, one_device) for part in graph_bytes(large, most + 1, one_device).values())
    assert fitting_tokens(large, one_device, Room(0, 2**62)) == large.model.context
    check_room(large, most, one_device, free)
    with pytest.raises(UserError, match=rf"^about {most:,} tokens fit into .* and the prompt has {most + 1:,} tokens"):
        check_room(large, most + 1, one_device, free)
    with pytest.raises(UserError, match="^no prompt fits into the memory that is free, 0.0 GiB"):
        check_room(large, 5, one_device, Room(0, 0))


def test_devices_of_a_host_share_its_memory_and_others_have_their_own(large, one_device):
    eight = Mesh(np.array(jax.devices()).reshape(1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    need = memory.Bytes(100, 50)
    assert Room(0, 150).holds(need, one_device) and not Room(0, 149).holds(need, one_device)
    assert Room(0, 850).holds(need, eight) and not Room(0, 849).holds(need, eight)

    class Gpu:
        platform = "gpu"

    class Mesh1:
        devices, size = np.array([Gpu()]), 1

    assert Room(100, 50).holds(need, Mesh1) and not Room(99, 1000).holds(need, Mesh1)
    assert not Room(1000, 49).holds(need, Mesh1)


def test_a_prompt_that_does_not_fit_is_refused_before_a_layer_is_run(tiny, one_device, monkeypatch):
    made = make_transcoders(tiny.config, "topk")
    assert certain_active(made[0].config) == 6 and certain_active(make_transcoders(tiny.config)[0].config) == 0
    size = GraphSize(tiny.config, made[0].config, 6.0)
    free = Room(0, max(map(sum, graph_bytes(size, 30, one_device).values())))
    monkeypatch.setattr(room, "free_room", lambda mesh: free)
    monkeypatch.setattr(attribute.Replacement, "of", lambda *arguments: pytest.fail("a layer was run"))
    with pytest.raises(UserError, match=r"^about 3\d tokens fit into .* has 60 tokens") as error:
        trace(tiny, made, [0] * 60)
    assert "\n" not in str(error.value)


def test_more_active_features_than_fit_are_refused_before_rows(tiny, one_device, monkeypatch):
    """Of ReLU transcoders it is known only after the layers have run."""
    made = make_transcoders(tiny.config)
    of, ran = Replacement.of, []

    def shrink(*arguments):
        ran.append(of(*arguments))
        monkeypatch.setattr(room, "free_room", lambda mesh: Room(0, memory._PROGRAMS + 100_000))
        return ran[0]

    monkeypatch.setattr(attribute.Replacement, "of", shrink)
    monkeypatch.setattr(attribute, "attributed", lambda *arguments: pytest.fail("a row was made"))
    with pytest.raises(
        UserError, match=r"has 7 tokens, for which the graph's rows would take 0\.4 GiB: shorten it, or"
    ):
        trace(tiny, made, IDS)
    assert len(ran[0].active)
