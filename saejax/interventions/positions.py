"""The editable positions of a prompt."""

import re

import numpy as np

from saejax.errors import UserError


def where(positions: str, last_B: np.ndarray, length: int) -> np.ndarray:
    """Return True at the named positions of prompts, bool [B, T].

    Args:
      positions: "all"; "last", each prompt's last token; or a slice of its tokens as in Python, such as "1:4" or "-3:".
      last_B: the index of each prompt's last token.
      length: T.

    Raises:
      UserError: ``positions`` is none of these.
    """
    start, stop = parse(positions)
    ends_Bx1, position_1xT = last_B[:, None] + 1, np.arange(length)[None, :]

    def bound(value: int | None, default: np.ndarray) -> np.ndarray:
        return default if value is None else np.clip(value + (value < 0) * ends_Bx1, 0, ends_Bx1)

    return (position_1xT >= bound(start, 0 * ends_Bx1)) & (position_1xT < bound(stop, ends_Bx1))


def parse(positions: str) -> tuple[int | None, int | None]:
    """Return the slice (start, stop) that a text such as ``1:4`` means, None for an open end."""
    if positions in ("all", "last"):
        return (None, None) if positions == "all" else (-1, None)
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", positions):
        raise UserError(f"there are no positions {positions!r}: expected all, last, or a slice such as 1:4 or -3:")
    start, _, stop = positions.partition(":")
    return (int(start) if start else None, int(stop) if stop else None)
