"""What programs make devices send, against counts by hand."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from preflight_setup import axes, needs_libtpu, on_mesh, plan_run, shape

from benchmarks.collectives import product_flops, sent_bytes
from saejax.dictionaries.kinds.jumprelu import JumpReLUConfig
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight import topology
from saejax.stages.train.plan import train_programs

LOOP = """
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), channel_id=1, %GROUPS%, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_programs_send_what_their_products_need_and_compute_their_share():
    """The first product is summed over the 4 devices of "model", those of the loop over the 2 of "data"."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))

    def placed(array, *spec):
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def function(x_BxT, w_TxD):
        y_BxD = placed(x_BxT @ w_TxD, "data", None)

        def again(total_DxD, _):
            return placed(y_BxD.T @ (y_BxD @ total_DxD), None, None), ()

        return jax.lax.scan(again, jnp.eye(16), None, length=5)[0]

    def argument(size, *spec):
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arguments = argument((64, 32), "data", "model"), argument((32, 16), "model", None)
    text = jax.jit(function).lower(*arguments).compile().as_text()
    first = 2 * 3 / 4 * (32 * 16 * 4)  # half of the rows is what each device sums with three others
    loop = 5 * 2 * 1 / 2 * (16 * 16 * 4)
    assert sent_bytes(text, 8, 8) == {"all-reduce": first + loop}
    assert sent_bytes(text, 8, 4) == {"all-reduce": first, "all-reduce between nodes": loop}
    assert sent_bytes(text, 8, 1) == {"all-reduce between nodes": first + loop}
    # Rows and the summed dimension of the first product are split; of the loop's, rows alone, over 2 of 8 devices.
    assert product_flops(text) == 2 * 64 * 32 * 16 / 8 + 5 * 2 * (2 * 64 * 16 * 16) / 2


@pytest.mark.parametrize(
    ("groups", "size", "near"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2, True),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, False),
        ("replica_groups=[2,4]<=[8]", 4, True),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, False),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, True),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, False),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8, False),
        ("replica_groups={}", 8, False),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size, near):
    label = "all-reduce" if near else "all-reduce between nodes"
    assert sent_bytes(LOOP.replace("%GROUPS%", groups), 8, 4) == {label: 5 * 2 * (size - 1) / size * 32}


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("f32[8]{0} all-gather(%x), replica_groups=[2,4]<=[8]", {"all-gather": 24}),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", {"all-gather": 24}),
        ("f32[8]{0} all-gather-done(%x)", {}),
        ("bf16[8]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]", {"reduce-scatter": 48}),
        ("(f32[8]{0}, pred[8]{0}) all-reduce(%x, %y), replica_groups=[2,4]<=[8]", {"all-reduce": 60}),
        ("f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", {"collective-permute": 32}),
        ("f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}", {}),
        ("f32[8]{0} add(%x, %y)", {}),
    ],
)
def test_what_a_ring_sends(line, sent):
    assert sent_bytes(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %r = {line}\n}}\n", 8, 4) == sent


def test_a_tpu_scatters_what_it_says_it_reduces():
    """Its compiler writes a fusion of a sum with the choice of a part, of which each device is sent that part alone."""
    text = """
%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %ar = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%ar, %at), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[2] {
  ROOT %r = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert sent_bytes(text, 8, 4) == {"reduce-scatter": 3 / 4 * 32}


def test_a_tpu_says_how_often_a_loop_runs_by_its_condition():
    text = """
%done.1 (p: (s32[], f32[8])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7), metadata={op_name="jit(step)/while"}
  %nine = s32[]{:T(128)} constant(9), metadata={op_name="jit(step)/while"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %nine), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %r = (s32[], f32[8]{0}) while(%x), condition=%done.1, body=%body.1
}
"""
    assert sent_bytes(text, 8, 4) == {"all-reduce": 9 * 2 * 3 / 4 * 32}
    assert sent_bytes(text.replace("compare(%i, %nine)", "and(%a, %b)"), 8, 4) == {"all-reduce": 2 * 3 / 4 * 32}


def test_nodes_of_gpus_are_stood_in_for():
    nodes = topology.find_slice("h100:2x4")
    assert (len(nodes.devices), nodes.limit) == (8, 72_000_000_000)
    assert [topology.find_slice(f"a100-{gb}:1").limit for gb in (40, 80)] == [36_000_000_000, 72_000_000_000]
    for name in ("h100", "h100:0", "h100:2x", "h100:2x4x1"):
        with pytest.raises(UserError, match=f"topology={name}: expected GPUs of a node"):
            topology.find_slice(name)
    with pytest.raises(UserError, match="JAX has begun with .* run experiments.preflight by itself"):
        topology.find_slice("h100:64x8")


@pytest.mark.parametrize("kind", ["matryoshka", "jumprelu"])
def test_nested_groups_send_one_sum_of_the_width_each(kind):
    """Features over four devices of which the first has three groups of its own, the others parts of two."""
    nested = dict(jumprelu=JumpReLUConfig(nested=(0.0625, 0.125, 0.25, 0.5, 1.0)))
    changes = dict(train__kinds=(kind,), train__by_kind=nested, train__expansion=(8,), train__batch=1024)
    plan = plan_run(shape("gpt2-medium"), "resid_post.12", axes(data=2, model=4), **changes)
    (program,) = train_programs(plan, plan.mesh)
    sends = sent_bytes(topology.compile_program(program).as_text(), 8, 8)
    groups = 2 * 3 / 4 * 512 * 1024 * 4 * 5
    gradients = 2 * 1 / 2 * (2 * 1024 * 8192 / 4) * 4
    assert set(sends) == {"all-reduce"}
    assert groups + gradients < sends["all-reduce"] < 1.05 * (groups + gradients)


@pytest.mark.slow
def test_the_benchmark_runs():
    command = [sys.executable, "-m", "benchmarks.bench_scaling", "--jobs=h100", "--tiny"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    by_mesh = {row["axes"]: row["sends"] for row in rows if not row["zero"]}
    assert list(by_mesh) == ["4 x 2 x 1", "2 x 4 x 1", "1 x 8 x 1", "1 x 1 x 8"]
    gradients = 2 * 64 * 512 * 4 * 9  # of the matrices of nine members
    assert by_mesh["4 x 2 x 1"]["all-reduce"] == pytest.approx(gradients, rel=0.05)
    whole, split = sorted((row for row in rows if row["axes"] == "1 x 8 x 1"), key=lambda row: row["zero"])
    moments = 2 * 2 * 64 * 512 * 4 * 36  # of which an eighth is left
    assert whole["memory"] - split["memory"] > 7 / 8 * moments
    sent = [sum(row["sends"].values()) for row in (whole, split)]
    assert sent[1] < 1.6 * sent[0], "a sum of gradients for all, and parts of the parameters once"


@needs_libtpu
def test_a_million_features_send_sums_of_the_width_and_counts_alone():
    tpus = topology.find_slice("v5e:2x4")
    mesh = make_mesh(MeshConfig(model=8), tpus.devices)
    changes = dict(train__kinds=("topk",), train__k=(64,), train__expansion=(512,), train__batch=1024)
    plan = plan_run(shape("gemma-2b"), "resid_post.8", train__matmul="bfloat16", **changes)
    (program,) = train_programs(on_mesh(plan, mesh), mesh)
    step, sends = (
        topology.compile_for(program, tpus.limit),
        sent_bytes(topology.compile_program(program).as_text(), 8, 8),
    )
    width = 2 * 7 / 8 * 1024 * plan.model.d_model * 4
    assert step.fits and set(sends) == {"all-reduce"}
    assert width < sends["all-reduce"] < 1.05 * width, "one sum of the width for each token, and counts"
