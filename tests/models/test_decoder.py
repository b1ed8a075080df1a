"""The decoder on SmolLM2 against transformers: logits, sites, gradients; the memory that a gradient takes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from loaded_models import fifty_prompts, load
from torch_sites import relative_error, run_torch

from saejax.models import decoder
from saejax.models.config import RunRules
from saejax.models.decoder import run_layers
from saejax.models.sites import KINDS, NEURONS, Site

SITES = [str(Site(kind, layer)) for layer in range(30) for kind in (*KINDS, NEURONS)]


@pytest.mark.parametrize("prompts", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_smollm2_equals_transformers(prompts, smollm2, smollm2_torch):
    """In fp32; or about as close to fp64, where fp32 is not good to 1e-5: a sink that layer 10 all but cancels."""
    tokens = smollm2.tokenize(fifty_prompts()[:prompts])
    sink = smollm2.tokenize(["The war lasted from the year 17"])  # the space before a year
    ours, ours_of_sink = smollm2(tokens, capture=SITES), smollm2(sink, capture=SITES).sites
    with torch.no_grad():
        logits, theirs = run_torch(smollm2_torch, tokens.ids_BxT)
        theirs_of_sink = {name: value.numpy() for name, value in run_torch(smollm2_torch, sink.ids_BxT)[1].items()}
        smollm2_torch.double()
        try:
            exact_of_prompts = run_torch(smollm2_torch, tokens.ids_BxT)[1]
            exact = {name: value.numpy() for name, value in run_torch(smollm2_torch, sink.ids_BxT)[1].items()}
        finally:
            smollm2_torch.float()
    mask = tokens.mask_BxT
    assert len(mask) == prompts
    difference = np.abs(np.asarray(ours.logits_BxTxV) - logits.detach().numpy())[mask].max()
    errors = {name: relative_error(value[mask], theirs[name].detach()[mask]) for name, value in ours.sites.items()}
    rounding = {
        name: relative_error(value.detach()[mask], exact_of_prompts[name].detach()[mask])
        for name, value in theirs.items()
    }
    worst = max(errors, key=errors.get)
    print(f"largest logit difference {difference:.2e}; largest error {errors[worst]:.2e}, at {worst}")
    assert len(errors) == 210
    assert difference < 1e-3
    # Both round: at resid_post.10, where large values all but cancel, transformers itself is 8.2e-6 to 1.0e-5 away from
    # fp64, and XLA 1.1e-5 on a processor with AVX-512, 5.0e-5 on one without; elsewhere at most 1.6e-5 there.
    assert all(errors[name] < max(2e-5, 8 * rounding[name]) for name in errors), worst
    our_error, their_error = (
        max(relative_error(values[name], exact[name]) for name in exact) for values in (ours_of_sink, theirs_of_sink)
    )
    print(f"largest errors against fp64: ours {our_error:.2e}, transformers' {their_error:.2e}")
    assert our_error < max(2e-5, 1.5 * their_error)


def test_smollm2_gradient_equals_autograd(smollm2, smollm2_torch):
    tokens = smollm2.tokenize(["The capital of France is the city of", "The keys near the cabinet", "3 + 4 ="])
    right, wrong = smollm2.token_id(" Paris"), smollm2.token_id(" the")
    rows, last = np.arange(3), tokens.last_B

    @jax.jit
    @jax.grad
    def gradient(x_BxTxD, params):  # parameters are arguments: XLA would take hours over them as constants
        x_BxTxD = run_layers(smollm2.config, params, x_BxTxD, 16, 30).x
        logits_BxV = decoder.unembed(smollm2.config, params, x_BxTxD[rows, last])
        return (logits_BxV[:, right] - logits_BxV[:, wrong]).sum()

    ours = gradient(smollm2(tokens, ["resid_post.15"], logits=False).sites["resid_post.15"], smollm2.params)
    logits, values = run_torch(smollm2_torch, tokens.ids_BxT)
    (logits[rows, last, right] - logits[rows, last, wrong]).sum().backward()
    theirs = values["resid_post.15"].grad.numpy()
    smollm2_torch.zero_grad()
    # Each prompt for itself: their gradients differ in size.
    errors = [relative_error(a[:n], b[:n]) for a, b, n in zip(ours, theirs, tokens.lengths_B, strict=True)]
    print(f"largest gradient error {max(errors):.2e}")
    assert max(errors) < 1e-4


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    """Config and parameters of a tiny Llama, and a stream [3, 12, D] that enters it."""
    config, params = load(tiny_llama)
    return config, params, jax.random.normal(jax.random.key(0), (3, 12, config.d_model))


def test_a_gradient_keeps_no_copy_of_the_parameters(tiny):
    config, params, x_BxTxD = tiny
    config_bytes = sum(value.nbytes for name, value in params.items() if name.startswith("layers."))
    tail = jax.grad(lambda params, x: run_layers(config, params, x, 0, 4).x[:, -1].sum(), argnums=1)
    compiled = jax.jit(tail).lower(params, x_BxTxD[:1, :2]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * config_bytes


def test_remat_takes_less_memory_for_the_same_gradient(tiny):
    config, params, x_BxTxD = tiny
    x_BxTxD = jnp.tile(x_BxTxD, (4, 2, 1))
    gradients, memory = [], []
    for remat in (False, True):
        run = partial(run_layers, config, start=0, stop=4, rules=RunRules(remat=remat))
        gradient = jax.grad(lambda x, params, run=run: run(params, x).x[:, -1].sum())
        compiled = jax.jit(gradient).lower(x_BxTxD, params).compile()
        gradients.append(compiled(x_BxTxD, params))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)
    assert memory[1] < 0.6 * memory[0]


@pytest.mark.parametrize("tied", [True, False])
def test_head_of_some_ids_gives_their_logits(tiny, tied):
    config, params, x_BxTxD = tiny
    config = dataclasses.replace(config, tied=tied, unembed_bias=True, final_logit_softcap=5.0)
    params = params | dict(unembed_bias_V=jnp.linspace(-1.0, 1.0, config.vocab))
    ids_N = jnp.array([7, 300, 7])
    few = decoder.unembed(config, decoder.restrict_unembedding(config, params, ids_N), x_BxTxD)
    np.testing.assert_allclose(few, decoder.unembed(config, params, x_BxTxD)[..., ids_N], atol=1e-5)
