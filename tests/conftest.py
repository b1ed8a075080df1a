"""Eight CPU devices for every test, strict broadcasting, and the models that many tests share."""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from saejax.parallel import AXES

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

TINY_TEXT = (
    "The cat near the dogs runs. The dogs near the cat run. The capital of France is Paris, and the capital of Spain "
    "is Madrid. The war lasted from the year 1732 to the year 1741. 3 + 4 = 7, 5 + 2 = 7, 1 + 8 = 9. One day, she said "
    "that there was a way to see where the water went, and that it was not far from here."
)


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="session")
def smollm2(one_device):
    """The real SmolLM2 in fp32 on one device, a ``LanguageModel``."""
    from saejax import load_model

    return load_model("smollm2", mesh=one_device)


@pytest.fixture(scope="session")
def smollm2_torch(smollm2):
    """The same weights in PyTorch, a transformers model in fp32."""
    from saejax.models import source

    return source.load_torch_model(smollm2.source, "float32")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder in the hub's format: a random Llama (4 layers, d 64, context 128) with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    save_tiny_llama(folder)
    save_tiny_tokenizer(folder, 384)
    return folder


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
