"""File formats of dictionaries, told apart by their files."""

import os
from pathlib import Path

from saejax.dictionaries.formats import own
from saejax.dictionaries.modules import Dictionary
from saejax.errors import UserError

save_dictionary = own.save


def load_dictionary(path: str | os.PathLike, operands: str = "float32") -> Dictionary:
    """Loads a dictionary from its folder, such as ``runs/demo/train/topk``.

    Args:
      path: a folder that ``save_dictionary`` or the train stage wrote.
      operands: dtype of the operands of its matrix products.

    Raises:
      UserError: no dictionary is there, or its files are damaged.
    """
    folder = Path(path)
    for candidate in (folder, folder / "dictionary"):
        if (candidate / own.DESCRIPTION).exists():
            return own.load(candidate, operands)
    raise UserError(
        f"{folder} holds no dictionary ({own.DESCRIPTION} is missing): name a folder that the train stage finished"
    )
