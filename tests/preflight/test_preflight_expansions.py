"""What a list of expansions takes."""

import pytest
from preflight_setup import on_mesh, plan_run, shape

from saejax.training.cost import train_cost, train_programs

STACK = dict(train__kinds=("topk",), train__seed=(1, 2))


def plan(**changes):
    return plan_run(shape("smollm2-135m"), "resid_post.15", text=(100, 10_000), **STACK | changes)


def test_it_takes_the_work_of_each_and_the_memory_of_the_widest():
    narrow, wide = (train_cost(plan(train__expansion=one), "topk") for one in (2, 4))
    both = train_cost(plan(train__expansions=(4, 2)), "topk")
    assert both.flops == pytest.approx(narrow.flops + wide.flops)
    assert both.disk == pytest.approx(narrow.disk + wide.disk)
    assert both.bytes == wide.bytes


def test_the_widest_is_the_one_that_must_fit(one_device):
    (program,) = train_programs(on_mesh(plan(train__expansions=(4, 2)), one_device), one_device)
    assert program.size == "2 members, 1024 tokens, 576 -> 2,304"
