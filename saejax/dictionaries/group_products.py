"""Products of groups of features with their rows of a matrix, also where features are split over devices.

Groups are runs of features, and a device has a run of them too, of one group or of several. To slice by groups what is
split over devices would send nearly all of it between them. So each device multiplies what it has of each group, and
the devices' products, of the width, are summed; which groups those are differs, so that one program has a branch for
each way of cutting, of which a device runs its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from saejax.dictionaries.matmul import over_rows, product, transposed

Parts: TypeAlias = tuple[tuple[int, int, int], ...]  # of each group that there is some of: its place, start and end


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def group_products(
    a_BxK: jax.Array, b_KxN: jax.Array, stops: tuple[int, ...], matmul_dtype: str = "float32"
) -> list[jax.Array]:
    """Of each group of columns of ``a`` and rows of ``b`` their product, as ``matmul``.

    Traced with a mesh as context (``jax.sharding.use_abstract_mesh``) whose ``model`` axis has several devices, K is
    taken to be split over that axis, and B over ``data``.

    In the gradient ``b`` is transposed as a whole: XLA:CPU (jaxlib 0.10) can make programs that crash where slices of
    it in bfloat16 are transposed and written out in memory.

    Args:
      a_BxK, b_KxN: matrices.
      stops: the end of each group, ascending; the last is K.
      matmul_dtype: as for ``matmul``.
    """
    mesh = _split_mesh()
    if mesh is None:
        return _products(a_BxK, b_KxN, _parts(stops, 0, stops[-1]), len(stops), matmul_dtype)

    def local(a_BxK: jax.Array, b_KxN: jax.Array) -> jax.Array:
        def branch(parts: Parts) -> Callable[..., jax.Array]:
            return lambda a_BxK, b_KxN: jnp.stack(_products(a_BxK, b_KxN, parts, len(stops), matmul_dtype))

        return lax.psum(_own_branch(mesh, stops, branch, a_BxK, b_KxN), "model")

    rows, columns = PartitionSpec("data", "model"), PartitionSpec("model", None)
    found_SxBxN = _over_devices(local, mesh, (rows, columns), PartitionSpec(None, "data", None))(a_BxK, b_KxN)
    return list(found_SxBxN)


def _forward(a_BxK, b_KxN, stops, matmul_dtype):
    return group_products(a_BxK, b_KxN, stops, matmul_dtype), (a_BxK, b_KxN)


def _backward(stops, matmul_dtype, saved, cotangents):
    mesh, (a_BxK, b_KxN) = _split_mesh(), saved
    if mesh is None:
        return _gradients(a_BxK, b_KxN, cotangents, _parts(stops, 0, stops[-1]), matmul_dtype)

    def local(a_BxK: jax.Array, b_KxN: jax.Array, *cotangents: jax.Array) -> tuple[jax.Array, jax.Array]:
        def branch(parts: Parts) -> Callable[..., tuple[jax.Array, jax.Array]]:
            return lambda a_BxK, b_KxN, *cotangents: _gradients(a_BxK, b_KxN, cotangents, parts, matmul_dtype)

        to_a, to_b = _own_branch(mesh, stops, branch, a_BxK, b_KxN, *cotangents)
        return to_a, lax.psum(to_b, "data")

    rows, columns = PartitionSpec("data", "model"), PartitionSpec("model", None)
    given = rows, columns, *[PartitionSpec("data", None)] * len(stops)
    return _over_devices(local, mesh, given, (rows, columns))(a_BxK, b_KxN, *cotangents)


group_products.defvjp(_forward, _backward)


def _products(a_BxK: jax.Array, b_KxN: jax.Array, parts: Parts, groups: int, matmul_dtype: str) -> list[jax.Array]:
    """Of each group; zeros where there is none of it."""
    found = {group: product(a_BxK[:, start:end], b_KxN[start:end], matmul_dtype) for group, start, end in parts}
    none = jnp.zeros_like(next(iter(found.values()))) if len(found) < groups else None
    return [found.get(group, none) for group in range(groups)]


def _gradients(
    a_BxK: jax.Array, b_KxN: jax.Array, cotangents: Sequence[jax.Array], parts: Parts, matmul_dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Of ``_products``, with respect to both matrices."""
    b_NxK = transposed(b_KxN, matmul_dtype)
    to_a = [product(cotangents[group], b_NxK[:, start:end], matmul_dtype) for group, start, end in parts]
    to_b = [over_rows(a_BxK[:, start:end], cotangents[group], matmul_dtype) for group, start, end in parts]
    return jnp.concatenate(to_a, axis=1), jnp.concatenate(to_b)


def _parts(stops: Sequence[int], start: int, stop: int) -> Parts:
    """Where the groups are in the features from ``start`` to ``stop``."""
    found = []
    for group, (first, last) in enumerate(zip((0, *stops), stops, strict=False)):
        if max(first, start) < min(last, stop):
            found.append((group, max(first, start) - start, min(last, stop) - start))
    return tuple(found)


def _split_mesh() -> AbstractMesh | None:
    """The mesh that is the context, if features are split over its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and mesh.shape.get("model", 1) > 1 else None


def _own_branch(mesh: AbstractMesh, stops: Sequence[int], branch: Callable, *arrays: jax.Array):
    """What the branch of a device's parts gives; to be traced on the device."""
    devices = mesh.shape["model"]
    size = stops[-1] // devices
    cuts = [_parts(stops, device * size, (device + 1) * size) for device in range(devices)]
    distinct = list(dict.fromkeys(cuts))
    own = jnp.asarray([distinct.index(cut) for cut in cuts])[lax.axis_index("model")]
    return lax.switch(own, [branch(cut) for cut in distinct], *arrays)


def _over_devices(local: Callable, mesh: AbstractMesh, given: tuple[PartitionSpec, ...], returned) -> Callable:
    """``local`` on each device's part; other axes of the mesh are left as they are."""
    split = dict(mesh=mesh, in_specs=given, out_specs=returned)
    return jax.shard_map(local, axis_names={"data", "model"}, check_vma=False, **split)
