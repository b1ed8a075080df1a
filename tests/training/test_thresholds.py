"""At inference, what was trained to keep k activations per token keeps k on its training rows: within 5 %."""

import numpy as np
import pytest
from small_runs import Rows, streamed
from small_runs import make_stack as make_run
from small_stacks import B, make_stack, train
from small_stacks import batches as some_batches

from saejax.dictionaries.cross_layer import FORM
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training.cross_layer import finish_layer
from saejax.training.state import finish_dictionary, init_state
from saejax.training.thresholds import Calibration

SWEEP = dict(k=(2, 6), sites=("resid_post.0", "resid_post.1"))


@pytest.mark.parametrize(
    ("kind", "mesh", "changes"),
    [
        pytest.param("batchtopk", None, SWEEP, marks=pytest.mark.slow),  # eight devices have it
        pytest.param("matryoshka", None, SWEEP, marks=pytest.mark.slow),  # whose threshold is found in the same way
        ("batchtopk", MeshConfig(2, 2, 2), SWEEP),
        ("batchtopk", None, dict(form=FORM, sites=("mlp_in.0", "mlp_in.1", "mlp_in.2"), auxk=0.0, k=(3,))),
    ],
    ids=["batchtopk", "matryoshka", "eight devices", "cross-layer transcoder"],
)
def test_each_member_keeps_its_own_k_at_its_own_site(kind, mesh, changes):
    stack, rows = make_run(kind, mesh and make_mesh(mesh), learning_rate=(1e-2,), **changes), Rows()
    batches = streamed(stack, rows)
    state, _ = train(stack, map(batches.batch, range(stack.steps)))
    kept_M = Calibration(stack)(state, batches, stack.steps)
    for index, member in enumerate(stack.members):
        finish = (lambda *args: finish_layer(*args)[0]) if "form" in changes else finish_dictionary
        finished = finish(stack, state, index, kept_M)
        f = np.asarray(finished.encode(rows.read(member.site, rows.rows("train"))))
        assert (f > 0).sum(1).mean() == pytest.approx(member.settings["k"], rel=0.05), member.name


def test_the_smallest_activation_is_kept_with_all_that_tie_with_it(one_device):
    class Repeated:
        def batch(self, step):
            return (np.tile(some_batches(1)[:, :1], (1, B, 1)),)

    stack = make_stack("batchtopk", one_device)
    state = init_state(stack)
    finished = finish_dictionary(stack, state, 0, Calibration(stack)(state, Repeated(), 1))
    f = np.asarray(finished.encode(Repeated().batch(0)[0][0]))
    assert ((f > 0).sum(1) == 4).all()


def test_kinds_without_a_threshold_are_not_calibrated():
    stack = make_stack("topk")
    assert Calibration(stack)(init_state(stack), None, 1) is None
