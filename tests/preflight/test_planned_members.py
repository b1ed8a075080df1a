"""Planned stacks: the sites of their members, and what a list of expansions takes."""

import pytest
from preflight_setup import on_mesh, plan_run, shape

from saejax.training.planned import checkpoint_bytes, train_programs

STACK = dict(train__kinds=("topk",), train__seed=(1, 2), train__epochs=2, train__batch=100)


def plan_stack(**changes):
    return plan_run(shape("smollm2-135m"), "resid_post.15", text=(100, 10_000), **STACK | changes)


def test_the_widest_is_the_one_that_must_fit_and_narrower_ones_add_their_steps(one_device):
    (program,) = train_programs(on_mesh(plan_stack(train__expansions=(4, 2)), one_device), one_device)
    assert program.size == "2 members, 100 tokens, 576 -> 2,304"
    (wide,) = train_programs(on_mesh(plan_stack(train__expansion=4), one_device), one_device)
    assert wide.runs == 200 and program.runs == pytest.approx(1.5 * wide.runs)
    (short,) = train_programs(on_mesh(plan_stack(train__max_steps=7), one_device), one_device)
    assert short.runs == 7


def test_checkpoints_that_are_kept_count():
    parameters = 2 * (2 * 576 * 4608 + 4608 + 576)
    assert checkpoint_bytes(plan_stack()) == parameters * 4 * (1 + 2 * 3)
    assert checkpoint_bytes(plan_stack(train__mu_dtype="bfloat16")) == parameters * (4 + 2 * (4 + 4 + 2))


def test_each_member_of_a_stack_of_transcoders_has_its_own_sites():
    plan = plan_run(
        shape("qwen3-0.6b"),
        capture__sites=tuple(f"{kind}.{layer}" for layer in (3, 7) for kind in ("mlp_in", "mlp_out")),
        train__sites=("mlp_in.3", "mlp_in.7"),
        train__form="transcoder",
        train__kinds=("topk",),
        ablate__dictionary="topk/mlp_in.7",
    )
    places = [("mlp_in.3", "mlp_out.3"), ("mlp_in.7", "mlp_out.7")]
    stack = plan.stacks["topk"]
    assert [(member.site, member.target) for member in map(stack.of, stack.members)] == places
    tested = plan.dictionary("ablate")
    assert (tested.site, tested.target) == places[1]
