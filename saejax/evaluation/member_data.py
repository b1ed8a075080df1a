"""A dictionary as data of a program, so that the members of a stack share what is compiled.

A compiled program depends on everything static about a dictionary. The members of a stack differ in their site, k and
thresholds; here these leave the static part, as arrays or altogether, and what remains is the same for all of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.parallel.mesh import fitting_sharding, sharding

# A list of what programs do not depend on: a field that is added later is kept until someone has thought about it.
_LEFT_OUT = frozenset({
    "site", "target", "model", "revision", "fingerprint", "bos",
    "max_norm", "target_max_norm", "max_norms",  # whoever calls the program leaves attention sinks out
    "k", "fires_above",  # numbers of kinds
})  # fmt: skip


def compiled_in(config: DictionaryConfig) -> DictionaryConfig:
    """Return the config without its place and its numbers: the same for dictionaries that share a program."""
    fields = dataclasses.fields(config)
    return DictionaryConfig(
        **{field.name: getattr(config, field.name) for field in fields if field.name not in _LEFT_OUT}
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemberData:
    """A dictionary whose own numbers are arrays. Inside a program it encodes and decodes as the dictionary does."""

    dictionary: Dictionary  #: what all members have in common, and the member's arrays
    #: its own of ``Kind.numbers``, such as k (topk); those of ``dictionary`` are the largest of all members.
    numbers: dict[str, jax.Array]

    @classmethod
    def of(cls, dictionaries: Sequence[Dictionary], mesh: Mesh) -> list[Self]:
        """Place the dictionaries of a stack on a mesh: features split over ``model``, the rest on every device.

        Raises:
          ValueError: they differ in kind or shape.
        """
        shared = [compiled_in(dictionary.config) for dictionary in dictionaries]
        if len({*shared}) > 1 or len({dictionary.matmul_dtype for dictionary in dictionaries}) > 1:
            raise ValueError(f"dictionaries of one program must have one kind and shape: {sorted(map(str, shared))}")
        # The largest k of all members is a static size of top-k; each member's own is data.
        largest: dict[str, Any] = {
            name: max(dictionary.numbers[name] for dictionary in dictionaries) for name in dictionaries[0].numbers
        }
        common = dataclasses.replace(shared[0], **largest)
        places = {name: fitting_sharding(mesh, shape, *axes) for name, (shape, axes) in parameter_table(common).items()}
        return [
            cls(
                Dictionary(
                    common,
                    dictionary.matmul_dtype,
                    **{name: jax.device_put(array, places[name]) for name, array in dictionary.arrays.items()},
                ),
                {name: jax.device_put(_number(value), sharding(mesh)) for name, value in dictionary.numbers.items()},
            )
            for dictionary in dictionaries
        ]

    @classmethod
    def abstract(cls, config: DictionaryConfig, matmul_dtype: str, dtype: str, mesh: Mesh) -> Self:
        """Return a member's shapes and shardings for this config; ``matmul_dtype``, ``dtype`` as in ``Dictionary``."""
        arrays = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(mesh, shape, *axes))
            for name, (shape, axes) in parameter_table(config).items()
        }
        dictionary = Dictionary(config, matmul_dtype, **arrays)
        numbers = {
            name: jax.ShapeDtypeStruct((), _number(value).dtype, sharding=sharding(mesh))
            for name, value in dictionary.numbers.items()
        }
        return cls(dictionary, numbers)

    def encode(self, x_xD: jax.Array) -> jax.Array:
        """Return feature activations, for any leading dimensions."""
        return self.dictionary.encode(x_xD, self.numbers)

    def decode(self, f_xF: jax.Array, x_xD: jax.Array) -> jax.Array:
        """Return the reconstruction, or the prediction of the target, from activations f and inputs x."""
        return self.dictionary.decode(f_xF, x_xD)

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Return where features fire."""
        return self.dictionary.kind.fires(f_xF, self.numbers)


def _number(value: float) -> np.ndarray:
    return np.asarray(value, np.int32 if isinstance(value, int) else np.float32)
