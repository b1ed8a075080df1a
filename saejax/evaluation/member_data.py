"""A dictionary as data of a program, so that the members of a stack share what is compiled.

A compiled program depends on everything static about a dictionary. The members of a stack differ in their site, k and
thresholds; here these leave the static part, as arrays or altogether, and what remains is the same for all of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, sparsity
from saejax.dictionaries.modules import parameter_table
from saejax.dictionaries.sparsity import row
from saejax.parallel import fitting_sharding, sharding

_COMPILED_IN = ("kind", "d_in", "n_features", "groups", "skip", "centred")  # beside the largest k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemberData:
    """A dictionary whose own numbers are arrays. Inside a program it encodes and decodes as the dictionary does.

    Attributes:
      arrays: those of ``parameter_table``.
      k: active features per token (topk).
      fires_above: |f| above which a feature fires (linear).
      common: what all members have in common; its ``k`` is the largest of theirs (static).
      operands: dtype of the operands of matrix products (static).
    """

    arrays: dict[str, jax.Array]
    k: jax.Array
    fires_above: jax.Array
    common: DictionaryConfig = dataclasses.field(metadata=dict(static=True))
    operands: str = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, dictionaries: Sequence[Dictionary], mesh: Mesh) -> list[Self]:
        """The dictionaries of a stack, placed on a mesh: features split over ``model``, the rest on every device.

        Raises:
          ValueError: they differ in kind or shape.
        """
        configs = [dictionary.config for dictionary in dictionaries]
        largest = max(config.k for config in configs)
        common = {
            DictionaryConfig(k=largest, **{name: getattr(config, name) for name in _COMPILED_IN}) for config in configs
        }
        if len(common) > 1 or len({dictionary.operands for dictionary in dictionaries}) > 1:
            raise ValueError(f"dictionaries of one program must have one kind and shape: {sorted(map(str, common))}")
        shared = common.pop()
        places = {name: fitting_sharding(mesh, shape, *axes) for name, (shape, axes) in parameter_table(shared).items()}
        return [
            cls(
                arrays={name: jax.device_put(array, places[name]) for name, array in dictionary.arrays.items()},
                k=jax.device_put(jnp.int32(dictionary.config.k), sharding(mesh)),
                fires_above=jax.device_put(jnp.float32(dictionary.config.fires_above), sharding(mesh)),
                common=shared,
                operands=dictionary.operands,
            )
            for dictionary in dictionaries
        ]

    @property
    def _dictionary(self) -> Dictionary:
        return Dictionary(self.common, self.operands, **self.arrays)

    def encode(self, x_BxD: jax.Array) -> jax.Array:
        """Feature activations, any leading dimensions."""
        dictionary = self._dictionary
        if self.common.kind != "topk":
            return dictionary.encode(x_BxD)
        pre_BxF = dictionary.pre_activations(x_BxD) + row(self.arrays["b_enc_F"], x_BxD.ndim)
        return sparsity.topk(pre_BxF, self.k, self.common.k)

    def decode(self, f_BxF: jax.Array, x_BxD: jax.Array) -> jax.Array:
        """The reconstruction, or the prediction of the target."""
        return self._dictionary.decode(f_BxF, x_BxD)

    def fires(self, f_BxF: jax.Array) -> jax.Array:
        """Where features fire."""
        return jnp.abs(f_BxF) > self.fires_above if self.common.kind == "linear" else f_BxF > 0
