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
