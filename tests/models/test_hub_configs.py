"""The config.json files of the models that the reasoning study uses."""

import math

import numpy as np
import pytest

from saejax.models.families import read_config
from saejax.models.parameters import parameter_table

# Their sizes and formulas as they stand on the hub. (What has no effect is in ``test_published_models``.)
HUB = {
    "gpt2-medium": dict(model_type="gpt2", n_ctx=1024, n_embd=1024, n_head=16, n_layer=24, n_positions=1024),
    "pythia-1.4b": dict(model_type="gpt_neox", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24),
    "gemma-2b": dict(model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18),
    "phi-2": dict(model_type="phi", hidden_size=2560, intermediate_size=10240, num_hidden_layers=32),
    "Meta-Llama-3-8B": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
    "Mistral-7B-v0.1": dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
    "Qwen3-4B-Instruct-2507": dict(
        model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, sliding_window=None
    ),
}
HUB["gpt2-medium"] |= dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, vocab_size=50257)
HUB["pythia-1.4b"] |= dict(num_attention_heads=16, rotary_emb_base=10000, rotary_pct=0.25, use_parallel_residual=True)
HUB["pythia-1.4b"] |= dict(hidden_act="gelu", layer_norm_eps=1e-5, max_position_embeddings=2048, vocab_size=50304)
HUB["pythia-1.4b"] |= dict(tie_word_embeddings=False)
HUB["gemma-2b"] |= dict(num_attention_heads=8, num_key_value_heads=1, head_dim=256, hidden_activation=None)
HUB["gemma-2b"] |= dict(hidden_act="gelu", max_position_embeddings=8192, rms_norm_eps=1e-6, rope_scaling=None)
HUB["gemma-2b"] |= dict(attention_bias=False, rope_theta=10000.0, vocab_size=256000)
HUB["phi-2"] |= dict(num_attention_heads=32, num_key_value_heads=32, partial_rotary_factor=0.4, qk_layernorm=False)
HUB["phi-2"] |= dict(hidden_act="gelu_new", layer_norm_eps=1e-5, max_position_embeddings=2048, rope_theta=10000.0)
HUB["phi-2"] |= dict(rope_scaling=None, tie_word_embeddings=False, vocab_size=51200)
HUB["Meta-Llama-3-8B"] |= dict(num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-5)
HUB["Meta-Llama-3-8B"] |= dict(max_position_embeddings=8192, rope_scaling=None, rope_theta=500000.0, vocab_size=128256)
HUB["Meta-Llama-3-8B"] |= dict(attention_bias=False, tie_word_embeddings=False)
HUB["Mistral-7B-v0.1"] |= dict(num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", sliding_window=4096)
HUB["Mistral-7B-v0.1"] |= dict(max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0, vocab_size=32000)
HUB["Mistral-7B-v0.1"] |= dict(tie_word_embeddings=False)
HUB["Qwen3-4B-Instruct-2507"] |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_act="silu")
HUB["Qwen3-4B-Instruct-2507"] |= dict(max_position_embeddings=262144, max_window_layers=36, use_sliding_window=False)
HUB["Qwen3-4B-Instruct-2507"] |= dict(rope_scaling=None, rope_theta=5000000, rms_norm_eps=1e-6, vocab_size=151936)
HUB["Qwen3-4B-Instruct-2507"] |= dict(attention_bias=False, tie_word_embeddings=True)
# Their sizes as published: number of parameters, without the unembedding where it is the embedding.
PARAMETERS = {
    "gpt2-medium": 354_823_168,
    "pythia-1.4b": 1_414_647_808,
    "gemma-2b": 2_506_172_416,
    "phi-2": 2_779_683_840,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen3-4B-Instruct-2507": 4_022_468_096,
}


@pytest.mark.parametrize("model", HUB)
def test_configs_of_the_hub_are_read(model):
    config = read_config(HUB[model], "config.json")
    assert sum(math.prod(shape) for shape, _ in parameter_table(config).values()) == PARAMETERS[model]


def test_what_the_hub_s_configs_say():
    gpt2, pythia, gemma, phi, llama, mistral, qwen = (read_config(data, "config.json") for data in HUB.values())
    assert (gpt2.d_mlp, gpt2.d_head, gpt2.activation, gpt2.tied, gpt2.learned_positions) == (
        4096, 64, "gelu_tanh", True, True,
    )  # fmt: skip
    assert (len(pythia.rope.frequencies), pythia.parallel, pythia.shared_norm) == (16, True, False)
    assert (gemma.activation, gemma.n_kv_heads, gemma.embed_scale, gemma.tied) == ("gelu_tanh", 1, 2048**0.5, True)
    assert (len(phi.rope.frequencies), phi.shared_norm, phi.unembed_bias) == (16, True, True)
    np.testing.assert_allclose(llama.rope.frequencies, 5e5 ** -(np.arange(0, 128, 2) / 128))
    assert (mistral.sliding_window, mistral.sliding_layers) == (4096, (True,) * 32)
    assert (qwen.qk_norm, qwen.sliding_layers, qwen.d_head) == (True, (), 128)
