"""BOS tokens in front of texts: one rule for all that runs a model with dictionaries.

Texts begin as the dictionary's training texts, ``DictionaryConfig.bos``. "auto", where that is not known: as the
model's tokenizer begins them.
"""

from collections.abc import Callable, Iterable

from absl import logging

from saejax.dictionaries.description import DictionaryConfig
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import bos_tokens


def follow_bos(
    lm: LanguageModel, dictionaries: Iterable[DictionaryConfig], say: Callable[[str], object] = logging.warning
) -> LanguageModel:
    """Return the model with texts that begin as the training texts of dictionaries.

    Args:
      lm: the model.
      dictionaries: dictionaries that are run with it; of several conventions the first counts.
      say: takes a line if texts begin otherwise than the model's did, or than the texts of one dictionary.
    """
    conventions = list(dict.fromkeys(config.bos for config in dictionaries if config.bos != "auto"))
    if not conventions or lm.tokenizer is None:
        return lm
    bos = conventions[0]
    if len(conventions) > 1:
        say(f"some dictionaries were trained with a BOS token in front of texts and others without: bos={bos} is used")
    try:
        before, front = bos_tokens(lm.tokenizer, lm.bos), bos_tokens(lm.tokenizer, bos)
    except UserError as error:
        say(f"the dictionary was trained with a BOS token in front of texts, and these have none: {error}")
        return lm
    if front != before:
        change = f"{lm.tokenizer.decode(front)!r} is put" if front else f"{lm.tokenizer.decode(before)!r} is not put"
        say(f"{change} in front of texts, as the dictionary was trained (bos={bos}) and unlike the tokenizer")
    return lm.with_bos(bos)
