"""Short names of many sites."""

import re

from saejax.errors import UserError

_RANGE = re.compile(r"([a-z_]+)\.([0-9]+)-([0-9]+)")
_MOST_LAYERS = 1000


def expand_ranges(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names with ranges of layers written out: "mlp_in.0-2" is mlp_in.0, mlp_in.1 and mlp_in.2.

    Raises:
      UserError: a range runs backwards or is too long for any model.
    """
    expanded: list[str] = []
    for name in names:
        parts = _RANGE.fullmatch(name)
        if not parts:
            expanded.append(name)
            continue
        kind, first, last = parts[1], int(parts[2]), int(parts[3])
        if not first <= last < _MOST_LAYERS:
            raise UserError(f"sites={name}: expected a first and a last layer, as in {kind}.0-29")
        expanded += [f"{kind}.{layer}" for layer in range(first, last + 1)]
    return tuple(expanded)
