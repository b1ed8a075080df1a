"""Cross-entropies against transformers' own loss."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from saejax import load_model
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation.loss_recovered import cross_entropies, recovered
from saejax.models import source


@pytest.fixture(scope="module")
def lm(tiny_llama, one_device):
    return load_model(str(tiny_llama), mesh=one_device)


def identity(lm, max_norm=1e9) -> Dictionary:
    """A dictionary that rebuilds its input: every direction and its opposite."""
    d = lm.config.d_model
    config = DictionaryConfig(kind="standard", site="resid_post.2", d_in=d, n_features=2 * d, max_norm=max_norm)
    both = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
    return Dictionary(config, both.T, jnp.zeros(2 * d), both, jnp.zeros(d))


def documents(lm) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 384, size=n).astype(np.int32) for n in (5, 40, 1, 17, 33, 2)]


def torch_ce(lm, change) -> float:
    """Mean loss over all predicted tokens, one unpadded document at a time, layer 2's output changed by a hook."""
    model = source.load_torch_model(lm.source, "float32")

    def hook(module, inputs, output):
        return change(output) if torch.is_tensor(output) else (change(output[0]), *output[1:])

    model.model.layers[2].register_forward_hook(hook)
    losses = []
    with torch.no_grad():
        for ids in documents(lm):
            if len(ids) > 1:
                logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0, :-1].double()
                losses.append(
                    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:].astype(np.int64)), reduction="none")
                )
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_every_variant_against_transformers(lm, batch_tokens):
    mean = np.random.default_rng(1).normal(size=64).astype(np.float32)
    ce = cross_entropies(lm, identity(lm), documents(lm), mean, batch_tokens)
    assert ce["tokens"] == 4 + 39 + 16 + 32 + 1
    np.testing.assert_allclose(ce["clean"], torch_ce(lm, lambda x: x), rtol=1e-5)
    np.testing.assert_allclose(ce["reconstructed"], ce["clean"], rtol=1e-5)
    np.testing.assert_allclose(ce["mean_ablated"], torch_ce(lm, lambda x: torch.tensor(mean).expand_as(x)), rtol=1e-5)
    np.testing.assert_allclose(ce["zero_ablated"], torch_ce(lm, torch.zeros_like), rtol=1e-5)
    np.testing.assert_allclose(recovered(ce, "mean_ablated"), 1, rtol=1e-3)


def test_sinks_keep_their_value(lm):
    limit = 8.0

    def change(x):
        return torch.where(x.norm(dim=-1, keepdim=True) <= limit, torch.zeros_like(x), x)

    ce = cross_entropies(lm, identity(lm, limit), documents(lm), np.zeros(64, np.float32))
    np.testing.assert_allclose(ce["zero_ablated"], torch_ce(lm, change), rtol=1e-5)
    everything = torch_ce(lm, torch.zeros_like)
    assert abs(ce["zero_ablated"] - everything) > 1e-3, "the limit must leave some positions as they are"


def test_nothing_to_recover_is_none():
    assert recovered(dict(clean=3.0, mean_ablated=2.9, reconstructed=3.1), "mean_ablated") is None


def test_works_on_eight_devices(lm, tiny_llama):
    ce = cross_entropies(lm, identity(lm), documents(lm), np.zeros(64, np.float32), 512)
    eight = cross_entropies(load_model(str(tiny_llama)), identity(lm), documents(lm), np.zeros(64, np.float32), 512)
    np.testing.assert_allclose(list(ce.values()), list(eight.values()), rtol=1e-5)


def test_bfloat16_model(tiny_llama, one_device, lm):
    low = load_model(str(tiny_llama), dtype="bfloat16", mesh=one_device)
    ce, ce_low = (cross_entropies(model, identity(lm), documents(lm), np.zeros(64, np.float32)) for model in (lm, low))
    np.testing.assert_allclose(ce_low["clean"], ce["clean"], rtol=0.03)
