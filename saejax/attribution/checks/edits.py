"""Changes of features to other activations, one by one and as the arrays that programs take, layer by layer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saejax.attribution.checks.changed_layers import LayerChanges
from saejax.attribution.local.replacement import Replacement
from saejax.errors import UserError


class Change(NamedTuple):
    """Feature ``feature`` of layer ``layer`` has the activation ``value`` at a position, or at all of a slice."""

    layer: int
    position: int | slice
    feature: int
    value: float


def edits_by_layer(replacement: Replacement, rows: Sequence[Sequence[Change]], tokens: int) -> dict[int, LayerChanges]:
    """The changes of all rows, by layer; slices mean positions of so many tokens.

    Raises:
      UserError: a feature or a position does not exist, or is changed twice in a row.
    """
    active, configs = replacement.active, replacement.dictionaries.configs
    by_layer: dict[int, list[list[tuple[int, int, int, float]]]] = {}
    for row, changes in enumerate(_at_positions(each, tokens) for each in rows):
        if len({change[:3] for change in changes}) != len(changes):
            raise UserError(f"row {row} changes a feature twice at one position: give it one value")
        for change in changes:
            layer, position, feature, value = change
            exists = 0 <= layer < len(configs) and 0 <= feature < configs[layer].n_features
            if not (exists and np.isfinite(value)):
                raise UserError(
                    f"feature {feature} of layer {layer} cannot be set to {value}: expected one of {len(configs)} "
                    f"layers, of {configs[0].n_features} features, and a finite number"
                )
            if not 0 <= position < tokens:
                raise UserError(f"position {position}: this prompt has the positions 0 to {tokens - 1}")
            by_layer.setdefault(int(layer), [[] for _ in rows])[row].append(change)
    found = {}
    most = max((len(changes) for lists in by_layer.values() for changes in lists), default=0)
    for layer, lists in by_layer.items():
        edits = LayerChanges(*(np.zeros((len(rows), most), dtype) for dtype in [np.int32] * 2 + [np.float32] * 2))
        for row, changes in enumerate(lists):
            for m, (_, position, feature, value) in enumerate(changes):
                place = active.place_of.get((layer, position, feature))
                own = 0.0 if place is None else active.value_A[place]
                for array, entry in zip(edits, (position, feature, value, own), strict=True):
                    array[row, m] = entry
        found[layer] = edits
    return found


def _at_positions(row: Sequence[Change], tokens: int) -> list[tuple[int, int, int, float]]:
    """The changes with each slice as its positions: layer, position, feature, value."""
    found = []
    for layer, position, feature, value in row:
        every = range(*position.indices(tokens)) if isinstance(position, slice) else [position]
        found += [(layer, one, feature, value) for one in every]
    return found
