"""Every family against transformers on tiny random checkpoints of unusual shapes."""

import functools
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from loaded_models import load, load_tiny, mesh_of
from tiny_models import save_tiny
from torch_sites import relative_error, run_torch

from saejax.models import decoder
from saejax.models.config import GRADIENT
from saejax.models.decoder import run_layers
from saejax.models.decoding import init_cache
from saejax.models.layers import Taps, norm
from saejax.models.sites import KINDS, NEURONS, Site
from saejax.parallel.mesh import fitting_sharding

LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", rope_theta=10_000.0, short_factor=[1.0, 1.2, 1.5, 2.0], partial_rotary_factor=0.7)
LONGROPE |= dict(long_factor=[4.0, 4.5, 5.0, 6.0])
LINEAR = dict(rope_type="linear", rope_theta=10_000.0, factor=3.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=5000.0, factor=2.0)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
PLAIN = dict(rope_type="default", rope_theta=300.0)
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
MULTI_QUERY, BIASED = dict(num_key_value_heads=1), dict(attention_bias=True)
THREE_HEADS = dict(num_attention_heads=3, num_key_value_heads=3)
ODD_SIZES = THREE_HEADS | dict(hidden_size=33, intermediate_size=50)
WINDOWS = dict(use_sliding_window=True, sliding_window=4)


def turned(rope, share):
    """Of which a share of each head turns."""
    return dict(rope_parameters=rope | dict(partial_rotary_factor=share))


# Prompts of 19 tokens, so that every window is shorter.
CASES = {
    "gpt2-odd_heads": dict(n_embd=45, n_head=3, n_inner=50, vocab_size=97),
    "gpt2-scaled_by_layer_untied": UNTIED
    | dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, activation_function="relu"),
    "gpt2-unscaled": dict(scale_attn_weights=False, n_head=8, activation_function="gelu", layer_norm_epsilon=1e-2),
    "gpt_neox-parallel": dict(hidden_size=64, hidden_act="gelu_fast"),
    "gpt_neox-sequential_odd_heads": dict(hidden_size=39, num_attention_heads=3, rotary_pct=0.5)
    | dict(use_parallel_residual=False, attention_bias=False),
    "gpt_neox-tied_linear": TIED | turned(LINEAR, 0.8) | dict(hidden_act="gelu_new"),
    "gpt_neox-all_turns": dict(rotary_pct=1.0, rotary_emb_base=500, layer_norm_eps=1e-3),
    "gemma-multi_query": MULTI_QUERY | dict(head_dim=20, hidden_act="gelu", rms_norm_eps=1e-3),
    "gemma-biases_untied": BIASED | UNTIED | dict(rope_parameters=LINEAR),
    "gemma-dynamic_odd_sizes": ODD_SIZES | dict(rope_parameters=DYNAMIC),
    "gemma2-capped": dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    "gemma2-multi_query_untied": MULTI_QUERY
    | UNTIED
    | dict(head_dim=14, layer_types=[GLOBAL, LOCAL, LOCAL], sliding_window=2)
    | dict(attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma2-biases_all_local": BIASED | dict(layer_types=[LOCAL] * 3, rope_parameters=YARN),
    "gemma3_text-two_ropes": {},
    "gemma3_text-multi_query_linear": MULTI_QUERY
    | dict(head_dim=20, final_logit_softcapping=4.0, rope_parameters={GLOBAL: LINEAR, LOCAL: PLAIN}),
    "gemma3_text-biases_untied": BIASED
    | UNTIED
    | dict(layer_types=[GLOBAL, LOCAL] * 2, sliding_window=3, rope_parameters={GLOBAL: YARN, LOCAL: DYNAMIC}),
    "gemma3-text_part": dict(sliding_window=4, num_hidden_layers=3, sliding_window_pattern=2),
    "phi-partial": dict(hidden_size=80) | turned(dict(rope_type="default"), 0.4),
    "phi-multi_query_normed": MULTI_QUERY | dict(qk_layernorm=True, hidden_act="relu"),
    "phi-tied_odd_heads": TIED | THREE_HEADS | dict(hidden_size=39) | turned(LLAMA3, 0.8),
    "llama-multi_query_llama3": MULTI_QUERY | dict(rope_parameters=LLAMA3),
    "llama-tied_yarn": TIED | dict(rope_parameters=YARN, head_dim=20, hidden_act="gelu"),
    "llama-biases_linear_odd_sizes": ODD_SIZES | BIASED | dict(head_dim=14, mlp_bias=True, rope_parameters=LINEAR),
    "mistral-window": {},
    "mistral-multi_query_one_token_window": MULTI_QUERY | TIED | dict(sliding_window=1),
    "mistral-no_window_wide_heads": dict(sliding_window=None, head_dim=22, rope_parameters=YARN | dict(truncate=False)),
    "qwen2-late_windows": WINDOWS | dict(max_window_layers=1),
    "qwen2-tied_multi_query_dynamic": TIED | MULTI_QUERY | dict(rope_parameters=DYNAMIC, rms_norm_eps=1e-3),
    "qwen2-listed_windows_odd_sizes": WINDOWS
    | dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, layer_types=[LOCAL, GLOBAL, LOCAL]),
    "qwen3-tied": TIED | dict(head_dim=20),
    "qwen3-biases_windows": BIASED | WINDOWS | dict(max_window_layers=2, rope_parameters=YARN),
    "qwen3-multi_query_llama3": MULTI_QUERY | dict(rope_parameters=LLAMA3, hidden_act="gelu_pytorch_tanh"),
    "olmo2-grouped": {},
    "olmo2-biases_tied_multi_query": MULTI_QUERY | BIASED | TIED | dict(rope_parameters=YARN),
    "olmo3-windows": {},
    "olmo3-multi_query_listed_yarn": MULTI_QUERY
    | dict(layer_types=[GLOBAL, LOCAL] * 2, rope_parameters={GLOBAL: YARN, LOCAL: PLAIN}),
    "gpt_oss-windows_yarn": dict(rope_parameters=YARN | dict(truncate=False)),
    "gpt_oss-clamped_unbiased_attention": MULTI_QUERY
    | dict(attention_bias=False, swiglu_limit=0.3, layer_types=[GLOBAL] * 3),
    "phi3-window": dict(sliding_window=5),
    "phi3-longrope_partial": MULTI_QUERY
    | dict(hidden_size=48, original_max_position_embeddings=20, rope_parameters=LONGROPE),
    "smollm3-every_second_plain": {},
    "smollm3-windows_in_plain_layers": WINDOWS | BIASED | dict(no_rope_layers=[1, 0, 0, 1], mlp_bias=True),
    "gpt_neo-local": {},
    "gpt_neo-untied_all_global": UNTIED
    | dict(attention_types=[[["global"], 3]], intermediate_size=50, activation_function="relu"),
    "qwen3_moe-probabilities": {},
    "qwen3_moe-normalised_window": BIASED | WINDOWS | dict(norm_topk_prob=True, num_experts_per_tok=4),
}
FIRST_CASES = {name.partition("-")[0]: name for name in reversed(CASES)}.values()  # one of each family
# Beside them, one of each rule that a family has, and of each way to turn heads; the slow suite has all.
RULES = {"gpt2-scaled_by_layer_untied", "gpt_neox-sequential_odd_heads", "phi-multi_query_normed"}
RULES |= {"gemma3_text-multi_query_linear", "qwen2-tied_multi_query_dynamic", "gpt_oss-clamped_unbiased_attention"}
RULES |= {"phi3-longrope_partial", "smollm3-windows_in_plain_layers"}
# What rounds in bfloat16 differs among these: norms, MLPs, caps, where norms stand, experts.
ROUNDED = {"gpt2", "gemma2", "gpt_oss"}
# Slopes are those of the same values, in families of the same parts: beside those, a parallel layer and other experts.
SLOPES = {name for name in FIRST_CASES if name.partition("-")[0] in ROUNDED | {"gpt_neox", "qwen3_moe"}}
LENGTH, MIDDLE = 19, 1
# Programs this small are run once or twice, so compiling them is what takes time: this makes it a third.
QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if version("jaxlib").startswith("0.10."):  # later ones refuse the option
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def kinds_of(config) -> tuple[str, ...]:
    """All kinds of sites but those of heads."""
    return KINDS if config.n_experts else (*KINDS, NEURONS)


@functools.partial(quick_jit, static_argnums=0)
def run_all(config, params, ids_BxT):
    """Logits, the values at all sites, and the gradients of a logit difference at the sites of the layer ``MIDDLE``."""
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    x_BxTxD, sites, _ = run_layers(config, params, x_BxTxD, 0, config.n_layers, Taps(collect=kinds_of(config)))
    logits_BxTxV = decoder.unembed(config, params, x_BxTxD)

    def difference(added):
        def hook(kind, layer, value_BxTxD):
            return value_BxTxD + added[kind] if kind in added else value_BxTxD

        start_BxTxD = sites["resid_pre"][MIDDLE]
        end_BxTxD = run_layers(
            config, params, start_BxTxD, MIDDLE, config.n_layers, Taps(hook, {MIDDLE}, inner_sites=True)
        ).x
        logits_BxV = decoder.unembed(config, params, end_BxTxD[:, -1])
        return (logits_BxV[:, 7] - logits_BxV[:, 20]).sum()

    shape = x_BxTxD.shape[:-1]
    zeros = {kind: jnp.zeros((*shape, Site(kind, MIDDLE).width(config))) for kind in kinds_of(config)}
    return logits_BxTxV, sites, jax.grad(difference)(zeros)


@functools.partial(quick_jit, static_argnums=0)
def run_plain(config, params, ids_BxT):
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    x_BxTxD, sites, _ = run_layers(config, params, x_BxTxD, 0, config.n_layers, Taps(collect=kinds_of(config)))
    return decoder.unembed(config, params, x_BxTxD), sites


@functools.partial(quick_jit, static_argnums=0)
def run_chunk(config, params, ids_BxT, cache):
    """Some new tokens of prompts: logits, the values at the sites of layer 0, and the cache."""
    seen = {}

    def hook(kind, layer, value_BxTxD):
        seen[kind] = value_BxTxD
        return value_BxTxD

    new = ids_BxT.shape[1]
    x_BxTxD = decoder.embed(config, params, ids_BxT, cache.positions_BxT(new))
    attention = cache.attention(config, new)
    ran = run_layers(config, params, x_BxTxD, 0, config.n_layers, Taps(hook, {0}), attention=attention)
    return decoder.unembed(config, params, ran.x), seen, cache.extend(ran.carried, new)


def sites_error(config, sites, expected) -> float:
    """The largest error at any site, against values by their names."""
    return max(
        relative_error(sites[kind][layer], expected[f"{kind}.{layer}"].detach())
        for kind in kinds_of(config)
        for layer in range(config.n_layers)
    )


def check_fp32(config, params, model, ids_BxT) -> dict[str, float]:
    ours, our_sites = run_plain(config, params, ids_BxT)
    theirs, their_sites = run_torch(model, ids_BxT)
    return dict(logits=relative_error(ours, theirs.detach()), sites=sites_error(config, our_sites, their_sites))


def check_gradients(config, params, model, ids_BxT) -> dict[str, float]:
    """With gradients: a program that takes twice as long to compile."""
    ours, our_sites, our_gradients = run_all(config, params, ids_BxT)
    theirs, their_sites = run_torch(model, ids_BxT)
    (theirs[:, -1, 7] - theirs[:, -1, 20]).sum().backward()
    # A parallel layer has no stream between attention and the MLP. Phi's attention and MLP read one tensor, and the MLP
    # of OLMo 2 reads the stream itself.
    skipped = {"resid_mid"} if config.parallel else set()
    skipped |= {"mlp_in"} if config.shared_norm or not config.pre_norms else set()
    kinds, sites = {*kinds_of(config)} - skipped, sites_error(config, our_sites, their_sites)
    gradients = [relative_error(our_gradients[kind], their_sites[f"{kind}.{MIDDLE}"].grad) for kind in kinds]
    return dict(logits=relative_error(ours, theirs.detach()), sites=sites, gradients=max(gradients))


def check_cached(config, params, model, ids_BxT) -> float:
    """Left padded prompts, four tokens at a time, against a pass of transformers with padding on the left."""
    pad_B = np.array([0, 7, LENGTH - 1])
    mask_BxT = np.arange(LENGTH) >= pad_B[:, None]
    positions_BxT = np.maximum(np.arange(LENGTH) - pad_B[:, None], 0)
    inputs = dict(attention_mask=torch.tensor(mask_BxT.astype(int)), position_ids=torch.tensor(positions_BxT))
    theirs, their_sites = run_torch(model, ids_BxT, **inputs)
    cache = init_cache(config, len(ids_BxT), LENGTH + 5, jnp.float32, pad_B)
    logits, first = [], []
    padded = np.pad(ids_BxT, ((0, 0), (0, -LENGTH % 4)))
    for chunk in np.split(padded, padded.shape[1] // 4, axis=1):
        chunk_logits, seen, cache = run_chunk(config, params, chunk, cache)
        logits.append(chunk_logits)
        first.append(seen["resid_post"])
    ours, our_first = (np.concatenate(parts, axis=1)[:, :LENGTH] for parts in (logits, first))
    return max(
        relative_error(ours[mask_BxT], theirs.detach()[mask_BxT]),
        relative_error(our_first[mask_BxT], their_sites["resid_post.0"].detach()[mask_BxT]),
    )


def check_bfloat16(folder, model, ids_BxT) -> dict[str, float]:
    """Against transformers in fp32 with the same (rounded) weights; beside it, what transformers in bf16 gives."""
    config, params = load(folder, "bfloat16")
    ours, our_sites = run_plain(config, params, ids_BxT)
    assert ours.dtype == jnp.float32
    theirs, _ = run_torch(model.bfloat16(), ids_BxT)
    exact, exact_sites = run_torch(model.float(), ids_BxT)
    errors = dict(
        bf16_logits=relative_error(ours, exact.detach()),
        bf16_sites=sites_error(config, our_sites, exact_sites),
        torch_bf16_logits=relative_error(theirs.detach().float(), exact.detach()),
    )
    assert max(errors["bf16_logits"], errors["bf16_sites"]) < 2.5e-2
    assert errors["bf16_logits"] < 1.3 * errors["torch_bf16_logits"]
    return errors


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST_CASES or n in RULES else pytest.mark.slow) for n in CASES]
)
def test_equals_transformers(name, tmp_path):
    config, params, model = load_tiny(tmp_path, name.partition("-")[0], **CASES[name])
    ids_BxT = np.random.default_rng(0).integers(4, config.vocab, (3, LENGTH))
    check = check_gradients if name in SLOPES else check_fp32
    errors = check(config, params, model, ids_BxT)
    errors["cached"] = check_cached(config, params, model, ids_BxT)
    if name in FIRST_CASES and name.partition("-")[0] in ROUNDED:
        errors |= check_bfloat16(tmp_path, model, ids_BxT)
    print(name, {key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors["logits"], errors["sites"], errors["cached"]) < 1e-5 and errors.get("gradients", 0.0) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CASES} - SLOPES))
def test_gradients_of_further_cases_equal_those_of_transformers(name, tmp_path):
    config, params, model = load_tiny(tmp_path, name.partition("-")[0], **CASES[name])
    ids_BxT = np.random.default_rng(0).integers(4, config.vocab, (3, LENGTH))
    assert check_gradients(config, params, model, ids_BxT)["gradients"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FIRST_CASES if name.partition("-")[0] not in ROUNDED])
def test_further_families_in_bfloat16_round_as_those_of_transformers(name, tmp_path):
    config, _, model = load_tiny(tmp_path, name.partition("-")[0], **CASES[name])
    check_bfloat16(tmp_path, model, np.random.default_rng(0).integers(4, config.vocab, (3, LENGTH)))


@pytest.mark.parametrize("family", ["llama", "olmo2", "olmo3", "gpt_oss", "gemma2", "smollm3"])
def test_norms_round_as_those_of_transformers(family, tmp_path):
    """In bfloat16 it counts whether they round before they scale or after; a last digit of the root may differ."""
    config, params, model = load_tiny(tmp_path, family)
    name = "attn_post_norm" if config.post_norms else "attn_norm"
    theirs = (
        model.bfloat16()
        .model.layers[0]
        .get_submodule("post_attention_layernorm" if config.post_norms else "input_layernorm")
    )
    x_NxD = torch.tensor(np.random.default_rng(0).normal(size=(300, config.d_model))).bfloat16()
    weights = {f"{name}_D": jnp.asarray(params[f"layers.{name}_D"][0], jnp.bfloat16)}
    ours_NxD = norm(config, GRADIENT, weights, name, jnp.asarray(x_NxD.float().numpy(), jnp.bfloat16))
    assert np.mean(np.asarray(ours_NxD, np.float32) != theirs(x_NxD).detach().float().numpy()) < 0.02


@pytest.mark.parametrize(
    ("family", "length", "layers"), [("gemma3_text", 150, 3), ("gpt_neox", 150, 3), ("llama", 2048, 1)]
)
def test_long_prompts(family, length, layers, tmp_path):
    """Long enough for attention to go through them in blocks; up to the context; later tokens reach no earlier ones."""
    changes = dict(max_position_embeddings=length, num_hidden_layers=layers)
    config, params, model = load_tiny(tmp_path, family, **changes)
    ids_BxT = np.random.default_rng(0).integers(4, config.vocab, (2, length))
    logits, sites = run_plain(config, params, ids_BxT)
    theirs, their_sites = run_torch(model, ids_BxT)
    assert relative_error(logits, theirs.detach()) < 1e-5
    assert relative_error(sites["attn_out"][-1], their_sites[f"attn_out.{layers - 1}"].detach()) < 1e-5
    changed, _ = run_plain(config, params, np.where(np.arange(length) < 101, ids_BxT, 5))
    np.testing.assert_array_equal(changed[:, :101], logits[:, :101])


# On 8 devices: all is split, the MLP is, nothing is. On 2 devices: all is, all is, all but 3 key-value heads is.
MESH_CASES = {
    "gpt2": dict(n_embd=48, n_head=8, vocab_size=136),
    "gemma3_text": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, vocab_size=133),
    "phi": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=50, vocab_size=130),
}


@pytest.mark.parametrize("family", MESH_CASES)
def test_meshes_agree(family, tmp_path):
    save_tiny(tmp_path, family, **MESH_CASES[family])
    ids_BxT = np.random.default_rng(0).integers(4, MESH_CASES[family]["vocab_size"], (4, 11)).astype(np.int32)
    results, split = [], []
    for mesh in (mesh_of(1, 1, 1), mesh_of(1, 1, 8), mesh_of(1, 4, 2)):
        config, params = load(tmp_path, mesh=mesh)
        ids = jax.device_put(ids_BxT, fitting_sharding(mesh, ids_BxT.shape, "data", None))
        logits, sites = run_plain(config, params, ids)
        results.append({"logits": logits} | sites)
        split.append({name for name, value in params.items() if not value.sharding.is_fully_replicated})
    assert split[0] == set()
    assert ("layers.q_DxHxK" in split[1], "layers.up_DxF" in split[1]) == (family == "gpt2", family != "phi")
    assert {"layers.q_DxHxK", "layers.up_DxF"} <= split[2]
    assert ("layers.k_DxNxK" in split[2]) == (family != "phi")
    one, *others = results
    errors = {name: max(relative_error(result[name], one[name]) for result in others) for name in one}
    print(family, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 3e-6
