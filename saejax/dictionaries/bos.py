"""BOS tokens in front of texts: whether a model's texts begin as those that a dictionary was trained on."""

from typing import Any

from absl import logging

from saejax.dictionaries.modules import Dictionary
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import bos_tokens


def bos_conflict(dictionary: Dictionary, tokenizer: Any) -> str:
    """Return in words how texts of a tokenizer differ from those of a dictionary's training; "": not in their BOS."""
    if tokenizer is None:
        return ""
    begins = tokenizer.bos_token_id is not None and bos_tokens(tokenizer)[:1] == [tokenizer.bos_token_id]
    return dictionary.config.bos_conflict(begins)


def warn_of_bos(lm: LanguageModel, dictionary: Dictionary) -> None:
    """Log a warning if one of them, a dictionary's training and the model's texts, has BOS tokens and the other not."""
    if conflict := bos_conflict(dictionary, lm.tokenizer):
        logging.warning("%s", conflict)
