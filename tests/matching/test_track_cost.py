"""What preflight says of the stage ``track``: it grows with texts and draws."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "preflight"))
from preflight_setup import plan_run, shape

from saejax.matching.track.cost import track_cost


def cost(**track):
    made = dict(
        train__kinds=("topk",), train__k=(8,), train__sites=("resid_post.0", "resid_post.5"),
        capture__sites=("resid_post.0", "resid_post.5"), track__dictionaries=("topk",),
        track__prompt="Ann has 3 apples. She buys 4 more. Now she has 7.",
    )  # fmt: skip
    return track_cost(plan_run(shape("smollm2-135m"), **made | track), "")


def test_track_says_what_it_takes():
    plain = cost()
    assert plain.counts == dict(texts=1, tests=3) and 0 < plain.flops < 1e14 and plain.bytes.model > 4e8
    assert plain.host_seconds > 4 and plain.disk > 0
    assert cost(track__draws=2000).flops > 3 * plain.flops
    both = cost(track__test_layers=(0, 5))
    assert both.counts["tests"] == 6 and both.flops > 1.5 * plain.flops
