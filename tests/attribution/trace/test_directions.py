"""The table of directions: what is written where, whatever the parts it comes in, and how much of it a device has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.attribution.local import rows
from saejax.attribution.local.rows import fill_table, read_directions
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig

WIDTH = 16


class Set:
    """Transcoders whose features write their layer, number and the layer above."""

    def __init__(self, layers: int, cross_layer: bool):
        self.configs, self._cross_layer, self.asked = [type("Config", (), dict(d_in=WIDTH))] * layers, cross_layer, []

    def written_layers(self, layer: int) -> int:
        return len(self.configs) - layer if self._cross_layer else 1

    def writes(self, layer: int, features_U: np.ndarray) -> np.ndarray:
        self.asked.append(len(features_U))
        above = np.arange(self.written_layers(layer))
        value_UxX = 1e4 * layer + features_U[:, None] + 0.1 * above
        return np.repeat(value_UxX[..., None], WIDTH, axis=2).astype(np.float32)


@pytest.mark.parametrize("cross_layer", [False, True])
def test_what_features_write_comes_in_order_a_part_at_a_time(cross_layer, monkeypatch):
    monkeypatch.setattr(rows, "READ_AT_ONCE", 6 * WIDTH)
    made, features = Set(3, cross_layer), [np.arange(7), np.array([], np.int64), np.array([2, 5])]
    whole = [Set(3, cross_layer).writes(layer, own).reshape(-1, WIDTH) for layer, own in enumerate(features)]
    assert np.array_equal(np.concatenate(list(read_directions(made, features))), np.concatenate(whole))
    assert max(made.asked) == (2 if cross_layer else 6), "no more is read at once than may be"


@pytest.mark.parametrize("model", [1, 8])
@pytest.mark.parametrize("counts", [(), (3,), (512,), (511, 1, 1), (700, 1000, 3)])
def test_rows_are_in_their_place_and_devices_have_their_part(model, counts):
    mesh = make_mesh(MeshConfig(model=model), jax.devices()[:model])
    rng = np.random.default_rng(0)
    first = [jnp.asarray(rng.normal(size=(count, WIDTH)), jnp.float32) for count in (5, 2)]
    parts = [rng.normal(size=(count, WIDTH)).astype(np.float32) for count in counts]
    room = -(-sum(counts) // rows.CHUNK) * rows.CHUNK + rows.CHUNK
    table_UxD = fill_table(mesh, first, iter(parts), room)
    known = np.concatenate([*first, *parts])
    assert np.array_equal(table_UxD, np.pad(known, ((0, 7 + room - len(known)), (0, 0))))
    assert {part.data.shape for part in table_UxD.addressable_shards} == {(7 + room, WIDTH // model)}
