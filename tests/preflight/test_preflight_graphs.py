"""Attribution graphs in preflight: their programs, and what is refused before anything runs."""

import dataclasses
import itertools
import json
import math
import struct

import jax
import numpy as np
import pytest
import yaml
from preflight_setup import axes, plan_run, shape

from saejax import save_transcoders
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.models.families import read_config
from saejax.preflight import topology
from saejax.stages.attribute.plan import attribute_programs, planned_graphs


@pytest.fixture(scope="module")
def model():
    return shape("smollm2-135m")


def save_set(folder, config):
    """ReLU transcoders of 48 features for a model's layers."""
    sizes = dict(kind="standard", d_in=config.d_model, n_features=48, centred=False)
    kinds = [DictionaryConfig(site=f"mlp_in.{i}", target=f"mlp_out.{i}", **sizes) for i in range(config.n_layers)]
    save_transcoders(folder, [Dictionary.initial(kind, jax.random.key(0)) for kind in kinds])


def trained(kind="topk", k=16):
    """A run that trains transcoders, and traces with them."""
    return dict(
        train__form="transcoder", capture__sites=("mlp_in.3", "mlp_out.3"), train__sites=("mlp_in.3",),
        train__kinds=(kind,), train__k=(k,), ablate__dictionary=kind, graph__transcoders=f"runs/x/train/{kind}",
    )  # fmt: skip


def make(model, **changes):
    return planned_graphs(plan_run(model, **trained() | changes))


def test_prompts_and_transcoders_that_the_run_trains(model, tmp_path):
    long = make(model, graph__prompt="The capital of France is" * 20)
    assert long.size.transcoder.n_features == 8 * 576 and long.size.active == 16
    assert 100 < long.longest < 150
    file = tmp_path / "two.jsonl"
    file.write_text('{"prompt": "a b c d"}\n{"token_ids": [1, 2, 3, 4, 5, 6]}\n')
    two = make(model, graph__prompts=str(file))
    assert two.lengths == (4, 6) and two.longest == 6
    assert two.rows == 16 * 30 * (3 + 5)  # all are fewer than --graph.max_features
    assert make(model, graph__behaviours=("capital", "addition")).lengths == (16, 16)
    jumprelu = trained("jumprelu") | dict(graph__prompt="a")
    assert make(model, **jumprelu).size.active == 64
    assert make(model, graph__prompt="a", graph__transcoders="org/set") is None


def test_a_set_on_disk_is_read_and_must_fit_the_model(tmp_path, inputs):
    config = read_config(json.loads((inputs[0] / "config.json").read_text()), "m")
    save_set(tmp_path / "set", config)
    graph = dict(graph__prompt="a", graph__transcoders=str(tmp_path / "set"))
    size = planned_graphs(plan_run(config, "resid_post.1", **graph)).size
    assert (size.transcoder.n_features, size.active) == (48, 64)
    with pytest.raises(UserError, match="no transcoder of layer 2: expected one for each layer of smollm2, 0 to 29"):
        planned_graphs(plan_run(shape("smollm2-135m"), **graph))


def sparse_set(folder, config, features):
    """A circuit-tracer set in bfloat16 of which the files have their length and no blocks on the disk."""
    shapes = dict(W_enc=(features, config.d_model), W_dec=(features, config.d_model), b_enc=(features,))
    shapes |= dict(b_dec=(config.d_model,))
    ends = np.cumsum([0, *(2 * int(np.prod(size)) for size in shapes.values())]).tolist()
    header = {
        name: dict(dtype="BF16", shape=size, data_offsets=offsets)
        for (name, size), offsets in zip(shapes.items(), itertools.pairwise(ends), strict=True)
    }
    header = json.dumps(header).encode()
    folder.mkdir()
    for layer in range(config.n_layers):
        with (folder / f"layer_{layer}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + ends[-1])
    hooks = dict(feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(model_name="x", model_kind="transcoder_set", **hooks)))


def test_a_set_of_60_gb_fits_eight_devices_of_which_each_has_its_part(tmp_path, quick_compiler):
    """Qwen3-4B's 36 layers of 163,840 features, 8,192 of them kept of a prompt of 2,048 tokens."""
    config = shape("qwen3-4b-instruct-2507")
    sparse_set(tmp_path / "set", config, 163_840)
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps(dict(slug="long", token_ids=list(range(1, 2049)))))
    graph = dict(graph__prompts=str(file), graph__transcoders=str(tmp_path / "set"), graph__max_features=8192)
    changes = graph | dict(model__dtype="bfloat16", preflight__topology="h100:8")
    plan = dataclasses.replace(plan_run(config, "resid_post.17", axes(model=8), **changes), stands_for="gpu")
    (program,) = attribute_programs(plan, plan.mesh)
    assert program.name == "attribute: rows"
    directions = 64 * 36 * 2047 + 73 * 2048
    compiled = topology.compile_for(program, int(0.9 * 80e9), 8)
    assert compiled.fits
    part = 4 * 2560 * (directions / 8 + 2 * 36 * 2048)  # in fp32, an eighth of the width; the streams; 64 targets
    assert part < compiled.memory < 1.6 * part
    assert program.size.startswith("64 targets, "), "a batch of GPUs, not of the processors that stand for them"
    # What a device has of each array that the program takes.
    arrays = [a for a in jax.tree.leaves((program.arguments, program.kept)) if isinstance(a, jax.ShapeDtypeStruct)]
    largest = max(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)
    assert largest <= 4 * 2560 * directions / 8


@pytest.mark.parametrize("graph", [dict(), dict(graph__prompt="a", graph__transcoders="org/set")])
def test_nothing_is_compiled_for_graphs_that_are_not_asked_for_or_not_known(model, graph):
    plan = plan_run(model, **trained() | graph)
    assert attribute_programs(plan, plan.mesh) == []
