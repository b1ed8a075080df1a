"""At inference, what was trained to keep k activations per token keeps k on its training rows: within 5 %."""

import numpy as np
import pytest
from small_runs import Rows, streamed
from small_runs import make_stack as make_run
from small_stacks import B, D, make_stack, train
from small_stacks import batches as some_batches

import saejax
from saejax.activations.in_memory import Activations
from saejax.activations.manifest import CapturedModel
from saejax.dictionaries.cross_layer import FORM
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training.cross_layer import finish_layer
from saejax.training.state import finish_dictionary, init_state
from saejax.training.thresholds import Calibration


def activations(rows=4096) -> Activations:
    """Sparse sums of 60 directions at one site."""
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(rows, 60)) * (rng.random((rows, 60)) < 0.1)
    values = (codes @ rng.normal(size=(60, D)) + 0.7).astype(np.float32)
    texts = [np.zeros(32, np.int32)] * (rows // 32)
    index = np.stack([np.arange(rows) // 32, np.arange(rows) % 32, np.zeros(rows)], axis=1).astype(np.int32)
    return Activations({"resid_post.0": values}, index, texts, 100.0, CapturedModel("made", "", "1"), bos=False)


@pytest.mark.slow  # members of few steps are calibrated below
@pytest.mark.parametrize("steps", [20, 600])
def test_short_and_long_runs(steps):
    acts = activations()
    settings = dict(k=4, features=64, batch=64, max_steps=steps, epochs=20)
    sae = saejax.train(acts, kind="batchtopk", on_progress=lambda line: None, **settings)
    l0 = (np.asarray(sae.encode(acts.values["resid_post.0"])) > 0).sum(1).mean()
    assert l0 == pytest.approx(4, rel=0.05)


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
