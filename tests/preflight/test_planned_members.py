"""Members of a planned stack are at their own sites."""

from preflight_setup import plan_run, shape


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
    assert [(one.site, one.target) for one in map(stack.of, stack.members)] == places
    tested = plan.dictionary("ablate")
    assert (tested.site, tested.target) == places[1]
