"""Products of fp32 arrays are fp32 products: GPUs and TPUs would round their operands, unless they are told not to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from every_kind import KINDS
from jax.extend.core import ClosedJaxpr, Jaxpr
from small_stacks import B, D, make_stack

from saejax.dictionaries import Dictionary, DictionaryConfig, sparse_products
from saejax.evaluation import cross_layer, reconstruction
from saejax.evaluation.member_data import MemberData
from saejax.ground_truth import scores
from saejax.ground_truth.settings import TruthConfig
from saejax.ground_truth.world import make_world, sample
from saejax.interventions import slopes as screening
from saejax.interventions.edits import ZERO
from saejax.interventions.rows import PromptTree
from saejax.models import decoder
from saejax.models.decoder import run_layers
from saejax.models.sites import Site
from saejax.models.split import SharedPrefixBatch, SplitPoint
from saejax.runner.results import load_results
from saejax.training.state import init_state
from saejax.training.step import train_step


def products(jaxpr):
    """All matrix products of a program, those inside its loops and branches included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        inner = lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr)  # noqa: E731
        for value in filter(inner, jax.tree.leaves(list(equation.params.values()), is_leaf=inner)):
            yield from products(getattr(value, "jaxpr", value))


def check(function, *args, least=1):
    found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
    assert len(found) >= least
    for equation in found:
        if equation.invars[0].aval.dtype == jnp.float32:
            assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, equation


@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, one_device):
    stack = make_stack(kind, one_device, auxk=0.03, decorrelation=0.01, matmul="float32")
    batch = (jnp.ones((1, B, D)),)
    check(functools.partial(train_step, stack), init_state(stack), stack.hyperparams, batch, least=5)


def test_evaluation(one_device):
    dictionary = Dictionary.initial(make_stack("topk", one_device).dictionary, jax.random.key(0))
    (member,) = MemberData.of([dictionary], one_device)
    check(reconstruction._score, member, jnp.ones((B, D)), jnp.ones((B, D)), 3, least=2)
    check(cross_layer._add_writes, jnp.ones((1, B, 8)), jnp.ones((8, 3 * D)), [jnp.ones((1, B, D))] * 2)


def test_gradients_at_active_features():
    feature_BxK = jnp.zeros((B, 2), int)
    check(sparse_products._products_at, feature_BxK, jnp.ones((8, D)), jnp.ones((B, D)))


def test_scores_of_known_features():
    world = make_world(TruthConfig(features=8, dimensions=D, roots=0, factors=2, orthogonalise=1))
    config = DictionaryConfig(kind="standard", site="resid_post.0", d_in=D, n_features=16)
    x_BxD, code_BxJ = sample(world, jax.random.key(0), B)
    places = dict(nearest_F=jnp.zeros(16, int)) | dict.fromkeys(("matched_J", "parent_J"), jnp.zeros(8, int))
    check(scores._count, Dictionary.initial(config, jax.random.key(0)), world, x_BxD, code_BxJ, places, jnp.float32(0))


def test_the_decoder_and_its_gradients(lm):
    def loss(params, ids_BxT):
        x_BxTxD = decoder.embed(lm.config, params, ids_BxT)
        x_BxTxD = run_layers(lm.config, params, x_BxTxD, 0, lm.config.n_layers).x
        return decoder.unembed(lm.config, params, x_BxTxD).sum()

    check(jax.grad(loss), lm.params, np.zeros((2, 6), np.int32), least=20)


def test_attribution(lm, one_device):
    config = DictionaryConfig(kind="standard", site="resid_post.1", d_in=lm.config.d_model, n_features=32)
    dictionary, site = Dictionary.initial(config, jax.random.key(0)), Site.parse(config.site)
    point = SplitPoint(lm.config, site, site, one_device)
    value = jnp.ones((2, 6, lm.config.d_model))
    tree = SharedPrefixBatch.unshared(jnp.arange(2), jnp.zeros(2, int), 6, 1)
    rows, tokens = PromptTree(tree, jnp.array([[5, 11]]), tree.prompt_SxR), value.reshape(1, 12, -1)
    past = jax.jit(point.run_suffix_with_kv)(lm.params, value, value)[1]
    fixed = past, value, tokens, rows, jnp.ones((1, 1, 2, 2), int)
    check(lambda params: screening.target_slopes(point, params, *fixed), lm.params, least=6)
    sides = screening.Sides(value, jnp.ones((2, 6), bool), None, None)
    check(lambda each: screening.score_slopes(point, each, sides, tree, tokens[None], ZERO), dictionary, least=2)


@pytest.mark.slow  # of the compiler with its full effort, as all of that suite
def test_a_program_of_nested_bfloat16_products_runs_to_its_end(inputs, tmp_path):
    """In a process of its own, compiled as in real runs: the compiled step once ended it, on a CPU."""
    changes = dict(task__behaviours="", train__kinds="matryoshka", train__matmul="bfloat16", train__source="model")
    flags = runs.small_flags(*inputs, tmp_path, train__max_steps=4, **changes)
    runs.finish(runs.start("train", flags, XLA_FLAGS=""))
    (member,) = load_results(tmp_path / "train" / "matryoshka").members
    assert np.isfinite(member.final["loss"])
