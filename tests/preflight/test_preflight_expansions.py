"""What a list of expansions takes."""

import pytest
from preflight_setup import on_mesh, plan_run, shape

from saejax.training.planned import checkpoint_bytes, train_programs

STACK = dict(train__kinds=("topk",), train__seed=(1, 2), train__epochs=2, train__batch=100)


def plan(**changes):
    return plan_run(shape("smollm2-135m"), "resid_post.15", text=(100, 10_000), **STACK | changes)


def test_the_widest_is_the_one_that_must_fit_and_narrower_ones_add_their_steps(one_device):
    (program,) = train_programs(on_mesh(plan(train__expansions=(4, 2)), one_device), one_device)
    assert program.size == "2 members, 100 tokens, 576 -> 2,304"
    (wide,) = train_programs(on_mesh(plan(train__expansion=4), one_device), one_device)
    assert wide.runs == 200 and program.runs == pytest.approx(1.5 * wide.runs)
    (short,) = train_programs(on_mesh(plan(train__max_steps=7), one_device), one_device)
    assert short.runs == 7


def test_checkpoints_that_are_kept_count():
    parameters = 2 * (2 * 576 * 4608 + 4608 + 576)
    assert checkpoint_bytes(plan()) == parameters * 4 * (1 + 2 * 3)
    assert checkpoint_bytes(plan(train__mu_dtype="bfloat16")) == parameters * (4 + 2 * (4 + 4 + 2))
