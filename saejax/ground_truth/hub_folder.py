"""Folders in the hub's format for models made here, which any stage and transformers can load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.files import whole_file, write_json


def save_model(
    folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], words: Sequence[str]
) -> None:
    """Write a model whose tokens are words separated by spaces.

    Args:
      folder: folder to write to; made if missing.
      fields: fields of ``config.json``, without the vocabulary.
      tensors: tensors by their names in the checkpoint; written in fp32.
      words: the vocabulary; the first is the BOS token.
    """
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    first = words[0]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=first))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=first, eos_token=first, pad_token=first, unk_token=first
    ).save_pretrained(folder)
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(contiguous, temporary, {"format": "pt"})
    special = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    write_json(folder / "config.json", dict(fields) | special | dict(vocab_size=len(words), dtype="float32"))
