"""Random models in the hub's format, small enough to make in a test."""

from pathlib import Path

TINY_TEXT = (
    "The cat near the dogs runs. The dogs near the cat run. The capital of France is Paris, and the capital of Spain "
    "is Madrid. The war lasted from the year 1732 to the year 1741. 3 + 4 = 7, 5 + 2 = 7, 1 + 8 = 9. One day, she said "
    "that there was a way to see where the water went, and that it was not far from here."
)


def save_tiny_llama(folder: Path, seed: int = 0, **changes) -> None:
    """Saves a random Llama with config fields changed; norms and biases are random too, to hide nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = dict(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(LlamaConfig(**fields | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)


def save_identity_llama(source: Path, folder: Path) -> None:
    """Save a Llama without what its layers add: the stream carries the embedding to the last norm, unchanged."""
    from safetensors.numpy import load_file, save_file

    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = 0 * weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


_TINY = dict(vocab_size=131, bos_token_id=None, eos_token_id=0, pad_token_id=0)
_TINY_ROTARY = _TINY | dict(
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TINY_FIELDS = {
    "gpt2": _TINY | dict(n_embd=40, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": {name: value for name, value in _TINY_ROTARY.items() if name != "num_key_value_heads"},
    "gemma": _TINY_ROTARY | dict(head_dim=12),
    "gemma2": _TINY_ROTARY | dict(head_dim=12, sliding_window=5, query_pre_attn_scalar=9),
    "gemma3_text": _TINY_ROTARY
    | dict(head_dim=12, sliding_window=5, num_hidden_layers=4, sliding_window_pattern=3, query_pre_attn_scalar=9),
    "phi": _TINY_ROTARY | dict(hidden_size=48),
    "llama": _TINY_ROTARY,
    "mistral": _TINY_ROTARY | dict(sliding_window=6),
    "qwen2": _TINY_ROTARY,
    "qwen3": _TINY_ROTARY | dict(head_dim=12),
    "olmo2": _TINY_ROTARY,
    "olmo3": _TINY_ROTARY | dict(num_hidden_layers=4, sliding_window=6),
    "gpt_oss": _TINY_ROTARY | dict(head_dim=12, sliding_window=5, num_local_experts=5, num_experts_per_tok=2),
    "phi3": _TINY_ROTARY | dict(original_max_position_embeddings=64),
    "smollm3": _TINY_ROTARY | dict(num_hidden_layers=4, no_rope_layer_interval=2),
    "gpt_neo": _TINY
    | dict(hidden_size=40, num_heads=4, num_layers=3, window_size=5, max_position_embeddings=64)
    | dict(attention_types=[[["global", "local"], 1], [["local"], 1]]),
    "qwen3_moe": _TINY_ROTARY | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=12),
}
# Architectures that the decoder does not have.
OTHER_FIELDS = {
    "gptj": _TINY | dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4),
    "bloom": _TINY | dict(hidden_size=32, n_layer=3, n_head=4),
    "opt": _TINY_ROTARY | dict(ffn_dim=48, word_embed_proj_dim=40),
    "mixtral": _TINY_ROTARY | dict(num_local_experts=4, num_experts_per_tok=2),
    "olmo": _TINY_ROTARY,
    "falcon": _TINY_ROTARY | dict(new_decoder_architecture=False),
    "qwen3_5_text": _TINY_ROTARY
    | dict(
        head_dim=12,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
TINY_FIELDS |= OTHER_FIELDS


def save_tiny(folder: Path, family: str, seed: int = 0, **changes) -> None:
    """Saves a random model (3 or 4 layers, d 40, context 64, 131 ids) of a family, with config fields changed.

    Everything is random, norms and biases too, but mild: sums stay in a range where bfloat16 is good to 1 %.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family == "gemma3":
        text = TINY_FIELDS["gemma3_text"] | changes
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
        special = dict(mm_tokens_per_image=4, boi_token_index=1, eoi_token_index=2, image_token_index=3)
        config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **special)
    else:
        config = AutoConfig.for_model(family, **TINY_FIELDS[family] | changes)
    model = AutoModelForCausalLM.from_config(config)
    _randomise(
        model,
        seed,
        plus_one=family.startswith("gemma"),
        post_norms=family.startswith(("gemma2", "gemma3", "olmo2", "olmo3")),
    )
    model.save_pretrained(folder)


def make_tiny(family: str, fields: dict):
    """A random transformers model of a family with these fields, as random as ``save_tiny`` makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    _randomise(model, 0, plus_one=False, post_norms=False)
    return model


def _randomise(model, seed: int, plus_one: bool, post_norms: bool) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif any(part in name for part in ("norm", "ln_1", "ln_2", "ln_f")):
                small = post_norms and ("post_attention" in name or "post_feedforward" in name)
                centre = 0.15 if small else 0.6 if "q_norm" in name or "k_norm" in name else 1.0
                parameter.copy_(centre - plus_one + (0.1 if small else 0.2) * noise)
            else:
                parameter.copy_(0.1 * noise)


def save_tiny_tokenizer(folder: Path, vocab: int) -> None:
    """Saves a byte-level BPE tokenizer of at most ``vocab`` ids, which can read any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", model_max_length=128
    ).save_pretrained(folder)


def byte_level_tokenizer():
    """A tokenizer of single bytes, with some pieces of two and three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("à", "¸"), ("Ġ", "à"), ("ð", "Ł")]
    vocab |= {"".join(pair): len(vocab) + index for index, pair in enumerate(merges)}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
