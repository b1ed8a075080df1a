"""A stage's jitted function with arguments that are shapes only, placed as the stage places them.

So it can be lowered and compiled for devices that are not there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table as dictionary_table
from saejax.dictionaries.modules import placements
from saejax.models.config import DecoderConfig
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import fitting_sharding, row_sharding, sharding, spread_sharding
from saejax.training.settings import TrainConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a stage: the function that the stage itself calls, not a copy."""

    name: str  #: stage and function
    size: str  #: size of its batch, in words
    function: Callable  #: the jitted function
    arguments: tuple  #: its arguments; arrays are shapes with their shardings
    kept: Any  #: arrays that the stage keeps on the devices besides the arguments
    flops: float  #: floating-point operations of a call on all devices, by formula
    runs: float = 0.0  #: estimated number of calls in the planned run; 0 where the text was not looked at

    def lower(self) -> jax.stages.Lowered:
        """Trace the function for the devices of its arguments."""
        return self.function.lower(*self.arguments)  # type: ignore[attr-defined]


def abstract_params(
    model: DecoderConfig, mesh: Mesh, dtype: str, layers: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the decoder's parameters as ``weights.load_params`` places them; the first ``layers`` if that is given."""
    params = {}
    for name, (shape, spec) in parameter_table(model).items():
        shape = (layers or shape[0], *shape[1:]) if name.startswith(LAYERS) else shape
        params[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(mesh, shape, *spec))
    return params


def abstract_dictionary(config: DictionaryConfig, train: TrainConfig, mesh: Mesh) -> Dictionary:
    """Return a dictionary whose features are split over ``model``; its sink rule is a placeholder."""
    config = config.with_sink_norms(lambda site: 1.0)
    where = placements(config, mesh)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, train.state_dtype, sharding=where[name])
        for name, (shape, _) in dictionary_table(config).items()
    }
    return Dictionary(config, train.matmul, **arrays)


def placed(tree: Any, placements: Any) -> Any:
    """Return the shapes of a tree with their places, a tree of shardings."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, placements)


def by_row(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return an array whose rows are split over ``member`` and ``data`` where these divide them."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=row_sharding(mesh, shape))


def spread(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return an array whose rows are split over all devices where these divide them."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=spread_sharding(mesh, shape[0]))


def whole(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return an array of which every device has a copy."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding(mesh))
