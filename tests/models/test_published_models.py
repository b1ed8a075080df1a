"""Checkpoints laid out as they are published, in miniature: config fields, tensor names, dtypes and files.

Every one has to load and give the logits that transformers gives on the same folder. Sizes are reduced and weights
drawn at random; nothing else is changed. Fields and names are facts of the repositories that the cases are named after.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import saejax
from saejax.models.families import read_config, unread_fields
from saejax.models.tokens import pad

Tensors = dict[str, torch.Tensor]
LAYERS = 3


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint."""

    config: dict  #: its ``config.json``, before sizes are reduced
    #: pattern and replacement by which tensor names differ from those of transformers.
    rename: tuple[str, str] = ("^$", "")
    extra: Callable[[Tensors], Tensors] = lambda tensors: {}  #: makes the tensors that a forward pass does not use
    dtype: str = "float32"  #: of the weights in the file
    shards: int = 1  #: number of weight files
    pickled: bool = False  #: whether they are ``pytorch_model.bin``


def in_every_layer(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """Add a tensor to each layer; "{}" in its name stands for the layer."""
    return lambda tensors: {name.format(layer): value.clone() for layer in range(LAYERS)}


def neox_buffers(mask: torch.dtype) -> Callable[[Tensors], Tensors]:
    def add(tensors: Tensors) -> Tensors:
        name = "gpt_neox.layers.{}.attention."
        buffers = in_every_layer(name + "bias", torch.tril(torch.ones(1, 1, 8, 8)).to(mask))(tensors)
        buffers |= in_every_layer(name + "masked_bias", torch.tensor(float("-inf")).half())(tensors)
        return buffers | in_every_layer(name + "rotary_emb.inv_freq", torch.rand(4).half())(tensors)

    return add


def stored_head(tensors: Tensors) -> Tensors:
    return {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def reward_heads(tensors: Tensors) -> Tensors:
    return {"score.weight": torch.ones(1, 32), "v_head.summary.weight": torch.ones(1, 32), "epoch": torch.tensor(3)}


MASK = torch.tril(torch.ones(1, 1, 8, 8))
GPT2 = dict(model_type="gpt2", activation_function="gelu_new", n_ctx=1024, n_positions=1024, n_embd=768, n_head=12)
GPT2 |= dict(n_layer=12, vocab_size=50257, layer_norm_epsilon=1e-5, summary_type="cls_index", resid_pdrop=0.1)
GPT2 |= dict(task_specific_params={"text-generation": {"do_sample": True}}, bos_token_id=0, eos_token_id=0)
STANFORD = dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, n_inner=None)
BARE_GPT2 = dict(rename=(r"^transformer\.", ""), extra=in_every_layer("h.{}.attn.bias", MASK))
NEOX = dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
NEOX |= dict(num_attention_heads=8, max_position_embeddings=2048, layer_norm_eps=1e-5, rotary_emb_base=10000)
NEOX |= dict(rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False, vocab_size=50304)
NEOX |= dict(bos_token_id=0, eos_token_id=0, torch_dtype="float16")
NEOX_20B = NEOX | dict(attention_probs_dropout_prob=0, hidden_dropout_prob=0, hidden_act="gelu_fast")
EMBED_OUT = (r"^lm_head\.", "embed_out.")
LLAMA = dict(model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
LLAMA |= dict(num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6, vocab_size=32000)
LLAMA |= dict(tie_word_embeddings=False, torch_dtype="float16", bos_token_id=1, eos_token_id=2, use_cache=True)
LLAMA2 = LLAMA | dict(num_key_value_heads=32, pretraining_tp=1, rope_scaling=None, max_position_embeddings=4096)
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA3_ROPE |= dict(rope_type="llama3")
LLAMA31 = LLAMA2 | dict(num_key_value_heads=8, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, mlp_bias=False)
LLAMA31 |= dict(attention_bias=False, max_position_embeddings=131072, eos_token_id=[1, 2, 3], torch_dtype="bfloat16")
MISTRAL = LLAMA | dict(model_type="mistral", num_key_value_heads=8, sliding_window=4096, rope_theta=10000.0)
QWEN2 = LLAMA | dict(model_type="qwen2", num_key_value_heads=8, rope_theta=1e6, use_sliding_window=False)
QWEN2 |= dict(sliding_window=32768, max_window_layers=24, tie_word_embeddings=True, attention_dropout=0.0)
QWEN3 = QWEN2 | dict(model_type="qwen3", attention_bias=False, head_dim=128, rope_scaling=None, sliding_window=None)
GEMMA = dict(model_type="gemma", hidden_act="gelu", hidden_activation=None, hidden_size=2048, head_dim=256)
GEMMA |= dict(intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1)
GEMMA |= dict(max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=10000.0, vocab_size=256000, pad_token_id=0)
GEMMA2 = GEMMA | dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
GEMMA2 |= dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256)
GEMMA2 |= dict(sliding_window=4096, num_key_value_heads=4, cache_implementation="hybrid")
GEMMA3 = {k: v for k, v in GEMMA.items() if k != "hidden_act"} | dict(hidden_activation="gelu_pytorch_tanh")
GEMMA3 |= dict(model_type="gemma3_text", query_pre_attn_scalar=256, sliding_window=512, rope_theta=1e6)
GEMMA3 |= dict(rope_local_base_freq=10000, sliding_window_pattern=6, attn_logit_softcapping=None)
SPARSE_TEXT = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
SPARSE_TEXT |= dict(rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
GEMMA3_4B = dict(model_type="gemma3", text_config=SPARSE_TEXT, vision_config=dict(model_type="siglip_vision_model"))
GEMMA3_4B |= dict(mm_tokens_per_image=256, boi_token_index=1, eoi_token_index=2, image_token_index=3)
PHI = dict(model_type="phi", hidden_act="gelu_new", hidden_size=2560, intermediate_size=10240, num_hidden_layers=32)
PHI |= dict(num_attention_heads=32, num_key_value_heads=None, partial_rotary_factor=0.5, layer_norm_eps=1e-5)
PHI |= dict(max_position_embeddings=2048, rope_theta=10000.0, qk_layernorm=False, vocab_size=51200)
GPT_NEO = dict(model_type="gpt_neo", activation_function="gelu_new", attention_types=[[["global", "local"], 2]])
GPT_NEO |= dict(attention_layers=["global", "local"] * 2, hidden_size=768, num_heads=16, num_layers=4)
GPT_NEO |= dict(intermediate_size=None, window_size=256, max_position_embeddings=2048, vocab_size=50257)
OLMO2 = LLAMA2 | dict(model_type="olmo2", attention_bias=False, rope_theta=500000, vocab_size=100352)
PHI3 = LLAMA2 | dict(model_type="phi3", sliding_window=2047, original_max_position_embeddings=4096)
PHI3 |= dict(pad_token_id=0, attention_bias=False, mlp_bias=False, lm_head_bias=False)
SMOLLM3 = LLAMA2 | dict(model_type="smollm3", num_key_value_heads=4, no_rope_layer_interval=4, rope_theta=5e6)
SMOLLM3 |= dict(pad_token_id=0, no_rope_layers=[1, 1, 1, 0] * 9, use_sliding_window=False, max_window_layers=28)
SMOLLM3 |= dict(sliding_window=None)
MOE = QWEN3 | dict(model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
MOE |= dict(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001)
MOE |= dict(output_router_logits=False, tie_word_embeddings=False)
GPT_OSS = dict(model_type="gpt_oss", num_local_experts=32, num_experts_per_tok=4, experts_per_token=4, swiglu_limit=7.0)
GPT_OSS |= dict(hidden_act="silu", hidden_size=2880, intermediate_size=2880, head_dim=64, num_attention_heads=64)
GPT_OSS |= dict(num_key_value_heads=8, num_hidden_layers=24, vocab_size=201088, max_position_embeddings=131072)
GPT_OSS |= dict(rope_theta=150000, initial_context_length=4096, sliding_window=128, attention_bias=True)
GPT_OSS |= dict(router_aux_loss_coef=0.9, output_router_logits=False, tie_word_embeddings=False, rms_norm_eps=1e-5)
YARN = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
GPT_OSS |= dict(rope_scaling=YARN | dict(original_max_position_embeddings=4096))
DUMP = dict(  # what a config that is written whole has besides
    **dict(return_dict=True, output_hidden_states=False, torchscript=False, use_bfloat16=False, tf_legacy_loss=False),
    **dict(pruned_heads={}, chunk_size_feed_forward=0, is_encoder_decoder=False, is_decoder=False, max_length=20),
    **dict(add_cross_attention=False, tie_encoder_decoder=False, do_sample=False, early_stopping=False, num_beams=1),
    **dict(diversity_penalty=0.0, temperature=1.0, top_k=50, repetition_penalty=1.0, no_repeat_ngram_size=0),
    **dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, num_labels=2, prefix=None, problem_type=None),
    **dict(bad_words_ids=None, remove_invalid_values=False, _name_or_path="x", transformers_version="4.38.0"),
)

PUBLISHED = {
    "gpt2": Published(GPT2, **BARE_GPT2),
    "DialoGPT-small": Published(
        GPT2, extra=in_every_layer("transformer.h.{}.attn.bias", MASK.byte()), pickled=True, dtype="float16"
    ),
    "stanford-crfm-alias": Published(GPT2 | STANFORD, rename=(r"^transformer\.", ""), pickled=True),
    "pythia-70m-deduped": Published(NEOX, EMBED_OUT, neox_buffers(torch.uint8), dtype="float16"),
    "gpt-neox-20b": Published(NEOX_20B, EMBED_OUT, neox_buffers(torch.uint8), shards=3, dtype="float16"),
    "dolly-v2-3b": Published(NEOX | dict(custom_pipelines={"text-generation": {}}), EMBED_OUT, pickled=True),
    "gemma-2b": Published(GEMMA, shards=2, dtype="bfloat16"),
    "gemma-2-9b-it": Published(GEMMA2 | dict(sliding_window_size=4096), dtype="bfloat16"),
    "gemma-3-270m": Published(GEMMA3 | dict(_sliding_window_pattern=6, use_bidirectional_attention=False)),
    "gemma-3-4b-it": Published(GEMMA3_4B, (r"^model\.language_model\.", "language_model.model."), dtype="bfloat16"),
    "gemma-3-4b-saved-later": Published(
        {k: v for k, v in GEMMA3_4B.items() if k != "torch_dtype"} | dict(dtype="float32")
    ),
    "llama-7b": Published(
        LLAMA | dict(max_sequence_length=2048, pad_token_id=0),
        extra=in_every_layer("model.layers.{}.self_attn.rotary_emb.inv_freq", torch.rand(4)),
        dtype="float16",
    ),
    "Llama-2-7b-hf": Published(LLAMA2, shards=3, pickled=True, dtype="float16"),
    "Llama-3.2-1B": Published(LLAMA31 | dict(head_dim=64, tie_word_embeddings=True), dtype="bfloat16"),
    "reward-model": Published(LLAMA31 | dict(num_labels=1), extra=reward_heads),
    "DeepSeek-R1-Distill-Qwen-1.5B": Published(QWEN2 | dict(tie_word_embeddings=False, use_mrope=False)),
    "Qwen2.5-Coder-1.5B": Published(QWEN2, extra=stored_head, dtype="bfloat16"),
    "Qwen3-1.7B-saved-by-4.57": Published(
        {k: v for k, v in QWEN3.items() if k != "torch_dtype"}
        | dict(dtype="float16", layer_types=["full_attention"] * 28)
    ),
    "Mistral-7B-v0.1": Published(MISTRAL, shards=2, dtype="bfloat16"),
    "Mistral-7B-Instruct-v0.3": Published(MISTRAL | DUMP | dict(sliding_window=None, rope_theta=1e6)),
    "phi-1_5": Published(PHI | dict(attention_dropout=0.0, auto_map={"AutoConfig": "configuration_phi.PhiConfig"})),
    "phi-2": Published(PHI | dict(partial_rotary_factor=0.4, num_key_value_heads=32), shards=2, dtype="float16"),
    "SmolLM2-135M": Published(LLAMA2 | dict(rope_interleaved=False, is_llama_config=True, tie_word_embeddings=True)),
    "SmolLM3-3B": Published(SMOLLM3 | dict(tie_word_embeddings=True)),
    "TinyStories-33M": Published(
        GPT_NEO, extra=in_every_layer("transformer.h.{}.attn.attention.masked_bias", torch.tensor(-1e9)), pickled=True
    ),
    "OLMo-2-0425-1B": Published(OLMO2, dtype="float32"),
    "Phi-3-mini-4k-instruct": Published(PHI3, shards=2, dtype="bfloat16"),
    "Qwen3-30B-A3B": Published(MOE, shards=3, dtype="bfloat16"),
    "gpt-oss-20b-BF16": Published(GPT_OSS, dtype="bfloat16"),
}


def shrink(config: dict) -> dict:
    """Return the config with small sizes; no field is added, but for those whose defaults are large."""
    small, text = {**config}, {**config.get("text_config", config)}
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_heads=4, num_hidden_layers=LAYERS)
    sizes |= dict(n_embd=32, n_head=4, n_layer=LAYERS, n_positions=64, n_ctx=64, vocab_size=96, num_layers=LAYERS)
    sizes |= dict(moe_intermediate_size=24, num_experts=6, num_local_experts=6, num_experts_per_tok=2, window_size=5)
    sizes |= dict(head_dim=12)
    sizes |= dict(layer_types=["full_attention"] * LAYERS, attention_layers=["global", "local", "global"])
    sizes |= dict(attention_types=[[["global", "local"], 1], [["global"], 1]], no_rope_layers=[1, 1, 0])
    sizes |= dict(hidden_size=80) if config["model_type"] == "phi" else {}  # so that 0.4 of a head is an even width
    sizes |= dict(num_key_value_heads=1 if config.get("num_key_value_heads") == 1 else 2, sliding_window=5)
    text |= {name: size for name, size in sizes.items() if text.get(name)}
    if text["model_type"].startswith("gemma3"):
        text["sliding_window_pattern"] = 2
    if config["model_type"] != "gemma3":
        return text
    text |= dict(vocab_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    return small | dict(text_config=text, vision_config=config["vision_config"] | vision, mm_tokens_per_image=4)


def publish(folder: Path, published: Published) -> None:
    """Write a checkpoint of random weights as it is published."""
    config = shrink(published.config)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if config["model_type"] == "gemma3" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float("norm" in name or "ln_" in name) * (not config["model_type"].startswith("gemma"))
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size="1GB")  # under the names that transformers publishes
    saved = load_file(folder / "model.safetensors")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    dtype = getattr(torch, published.dtype)
    tensors = {re.sub(*published.rename, name): value.to(dtype) for name, value in saved.items()}
    write(folder, tensors | published.extra(tensors), published)


def write(folder: Path, tensors: Tensors, published: Published) -> None:
    """Write weight files, with an index where there are several."""
    stem, suffix = ("pytorch_model", ".bin") if published.pickled else ("model", ".safetensors")
    save = torch.save if published.pickled else save_file
    if published.shards == 1:
        save(tensors, folder / f"{stem}{suffix}")
        return
    weight_map, names = {}, list(tensors)
    for part in range(published.shards):
        file = f"{stem}-{part + 1:05d}-of-{published.shards:05d}{suffix}"
        weight_map |= dict.fromkeys(names[part :: published.shards], file)
        save({name: tensors[name] for name in names[part :: published.shards]}, folder / file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


def check_logits(folder: Path) -> None:
    lm = saejax.load_model(str(folder))
    ids_BxT = np.random.default_rng(1).integers(4, lm.config.vocab, (2, 12))
    ours = np.asarray(lm(pad(ids_BxT.tolist())).logits_BxTxV)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor(ids_BxT)).logits.numpy()
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


# One of each family and of each form of names, files, dtypes and tensors besides.
FEW = {
    *("gpt2", "DialoGPT-small", "stanford-crfm-alias", "pythia-70m-deduped", "gpt-neox-20b", "gemma-2b"),
    *("gemma-2-9b-it", "gemma-3-270m", "gemma-3-4b-it", "llama-7b", "Llama-2-7b-hf", "Llama-3.2-1B", "reward-model"),
    *("Qwen2.5-Coder-1.5B", "Qwen3-1.7B-saved-by-4.57", "Mistral-7B-v0.1", "phi-2", "SmolLM3-3B", "TinyStories-33M"),
    *("OLMo-2-0425-1B", "Phi-3-mini-4k-instruct", "Qwen3-30B-A3B", "gpt-oss-20b-BF16"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in PUBLISHED])
def test_published_checkpoints_load_and_agree_with_transformers(name, tmp_path, cache):
    folder = tmp_path / name
    folder.mkdir()
    publish(folder, PUBLISHED[name])
    check_logits(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_published_field_calls_for_a_comparison_at_the_first_load(name):
    config = shrink(PUBLISHED[name].config)
    assert unread_fields(config, "config.json") == [] and read_config(config, "config.json").n_layers == LAYERS
