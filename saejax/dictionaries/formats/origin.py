"""What a file of another tool says that a dictionary has no place for, kept in ``DictionaryConfig.origin``.

So a dictionary that is loaded and written again in the same format loses nothing: not its file's dtype, not the data
set it was trained on, not the spelling of a hook.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from saejax.dictionaries.modules import DictionaryConfig


def describe(format: str, dtype: np.dtype, settings: Mapping[str, Any]) -> str:
    """The text for ``DictionaryConfig.origin``.

    Args:
      format: of the file.
      dtype: of its arrays.
      settings: all that its description says.
    """
    return json.dumps(dict(format=format, dtype=np.dtype(dtype).name, settings=settings))


def settings_of(config: DictionaryConfig, format: str) -> dict[str, Any]:
    """What the description of the file said, if the dictionary came from a file of this format; else nothing."""
    known = json.loads(config.origin) if config.origin else {}
    return known["settings"] if known.get("format") == format else {}


def dtype_of(config: DictionaryConfig) -> str:
    """The dtype of the file's arrays; "" if the dictionary did not come from another tool's file."""
    return json.loads(config.origin)["dtype"] if config.origin else ""
