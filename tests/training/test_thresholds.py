"""At inference, what was trained to keep k activations per token keeps k on its training rows: within 5 %."""

import jax
import numpy as np
import pytest
from small_runs import Rows, streamed
from small_runs import make_stack as make_run
from small_stacks import D, make_stack

import saejax
from saejax.activations.manifest import CapturedModel
from saejax.library.activations import Activations
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training.cross_layer import finish_layer
from saejax.training.state import finish_dictionary, init_state
from saejax.training.step import compile_step
from saejax.training.thresholds import calibrate_thresholds


def activations(rows=4096) -> Activations:
    """Sparse sums of 60 directions at one site."""
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(rows, 60)) * (rng.random((rows, 60)) < 0.1)
    values = (codes @ rng.normal(size=(60, D)) + 0.7).astype(np.float32)
    texts = [np.zeros(32, np.int32)] * (rows // 32)
    index = np.stack([np.arange(rows) // 32, np.arange(rows) % 32, np.zeros(rows)], axis=1).astype(np.int32)
    return Activations({"resid_post.0": values}, index, texts, 100.0, CapturedModel("made", "", "1"), bos=False)


@pytest.mark.parametrize("steps", [20, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_short_and_long_runs(kind, steps):
    """After few steps the running mean of the batches' thresholds lags far behind."""
    acts = activations()
    settings = dict(k=4, features=64, batch=64, max_steps=steps, epochs=20)
    sae = saejax.train(acts, kind=kind, on_progress=lambda line: None, **settings)
    l0 = (np.asarray(sae.encode(acts.values["resid_post.0"])) > 0).sum(1).mean()
    assert l0 == pytest.approx(4, rel=0.05)


def trained(stack, rows):
    state, train_step, batches = init_state(stack), compile_step(stack), streamed(stack, rows)
    for step in range(stack.steps):
        state, metrics = train_step(state, stack.hyperparams, batches.batch(step))
        jax.block_until_ready(metrics)
    return calibrate_thresholds(stack, state, batches)


def check(dictionary, rows, member, k):
    f = np.asarray(dictionary.encode(rows.read(member.site, rows.rows("train"))))
    assert (f > 0).sum(1).mean() == pytest.approx(k, rel=0.05), member.name


@pytest.mark.parametrize("mesh", [None, MeshConfig(2, 2, 2)], ids=["one device", "eight devices"])
def test_members_of_a_sweep(mesh):
    """Each by its own k, and by its own site."""
    sites = ("resid_post.0", "resid_post.1")
    changes = dict(k=(2, 6), sites=sites, learning_rate=(1e-2,))
    stack, rows = make_run("batchtopk", mesh and make_mesh(mesh), **changes), Rows()
    state = trained(stack, rows)
    for index, member in enumerate(stack.members):
        check(finish_dictionary(stack, state, index), rows, member, member.settings["k"])


def test_layers_of_a_cross_layer_transcoder():
    form = dict(form="cross_layer_transcoder", sites=("mlp_in.0", "mlp_in.1", "mlp_in.2"), auxk=0.0)
    stack, rows = make_run("batchtopk", k=(3,), learning_rate=(1e-2,), **form), Rows()
    state = trained(stack, rows)
    for layer, member in enumerate(stack.members):
        check(finish_layer(stack, state, layer)[0], rows, member, 3)


def test_kinds_without_a_running_threshold_stay_as_they_are():
    stack = make_stack("topk")
    state = init_state(stack)
    assert calibrate_thresholds(stack, state, None) is state
