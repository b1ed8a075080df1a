"""Products with TopK codes as Pallas kernels: sums of gathered rows, and products of rows with rows.

They are lowered by Triton for a GPU, and interpreted on a CPU, which is for checks alone: it is far slower than any
other form. Rows may be bfloat16; sums are in the weights' dtype. There are none for a TPU, where each row that is
gathered takes a copy from HBM of its own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_ROWS = 16  # gathered at once
_WIDTH = 256  # of a row, at most; a power of 2, as Triton's blocks are


def segment_sums(
    starts_X: jax.Array, row_N: jax.Array, terms: Sequence[tuple[jax.Array, jax.Array]], base: jax.Array | None = None
) -> list[jax.Array]:
    """For each term (weight_N, values_RxD) the sums of weight_n values[row_n] over each of S segments, [S, D].

    One kernel for all terms: rows' numbers are read once.

    Args:
      starts_X: where each segment begins, and the end of the last, S + 1 numbers that do not fall, int32.
      row_N: rows of the values, int32.
      terms: weights and values, which are all of one shape.
      base: what is added to the first term's sums, [S, D].
    """
    weights, values = zip(*terms, strict=True)
    width, segments = values[0].shape[1], len(starts_X) - 1
    body = functools.partial(_add_segments, terms=len(terms), has_base=base is not None)
    out = [jax.ShapeDtypeStruct((segments, width), weight_N.dtype) for weight_N in weights]
    arrays = starts_X, row_N, *weights, *values, *(() if base is None else (base,))
    return _launch(body, out, (segments, pl.cdiv(width, _block(width))), arrays)


def _add_segments(starts_ref, row_ref, *refs, terms: int, has_base: bool) -> None:
    """One segment, and some of the width."""
    weights, values, outs = refs[:terms], refs[terms : 2 * terms], refs[2 * terms + has_base :]
    at, width = pl.program_id(0), outs[0].shape[1]
    column_W, inside_W = _columns(pl.program_id(1), width)
    begin, end = starts_ref[at], starts_ref[at + 1]

    def add(turn: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place_C = begin + turn * _ROWS + jnp.arange(_ROWS)
        row_C = _load(row_ref, (place_C,), place_C < end)
        inside_CxW = (place_C < end)[:, None] & inside_W[None]
        added = []
        for weight_ref, values_ref, sum_W in zip(weights, values, sums, strict=True):
            weight_C = _load(weight_ref, (place_C,), place_C < end)
            values_CxW = _load(values_ref, (row_C[:, None], column_W[None]), inside_CxW).astype(sum_W.dtype)
            added.append(sum_W + jnp.sum(weight_C[:, None] * values_CxW, axis=0))
        return tuple(added)

    zeros = tuple(jnp.zeros(column_W.shape, out.dtype) for out in outs)
    sums = list(lax.fori_loop(0, pl.cdiv(end - begin, _ROWS), add, zeros))
    if has_base:
        sums[0] += _load(refs[2 * terms], (at, column_W), inside_W)
    for out, sum_W in zip(outs, sums, strict=True):
        _store(out, (at, column_W), sum_W, inside_W)


def row_products(row_BxK: jax.Array, values_RxD: jax.Array, with_BxD: jax.Array) -> jax.Array:
    """values[row_bk] . with_b, [B, K], in the dtype of ``with_BxD``.

    Args:
      row_BxK: rows of the values, int32.
      values_RxD: what is gathered.
      with_BxD: the other factor, one row for each of B.
    """
    out = jax.ShapeDtypeStruct(row_BxK.shape, with_BxD.dtype)
    grid = len(row_BxK), pl.cdiv(row_BxK.shape[1], _ROWS)
    return _launch(_multiply_rows, [out], grid, (row_BxK, values_RxD, with_BxD))[0]


def _multiply_rows(row_ref, values_ref, with_ref, out_ref) -> None:
    """Some of one row's numbers."""
    at, place_C = pl.program_id(0), pl.program_id(1) * _ROWS + jnp.arange(_ROWS)
    asked_C, width = place_C < row_ref.shape[1], with_ref.shape[1]
    row_C = _load(row_ref, (at, place_C), asked_C)

    def add(turn: jax.Array, sum_C: jax.Array) -> jax.Array:
        column_W, inside_W = _columns(turn, width)
        inside_CxW = asked_C[:, None] & inside_W[None]
        values_CxW = _load(values_ref, (row_C[:, None], column_W[None]), inside_CxW).astype(sum_C.dtype)
        return sum_C + jnp.sum(values_CxW * _load(with_ref, (at, column_W), inside_W)[None], axis=1)

    blocks = pl.cdiv(width, _block(width))
    _store(out_ref, (at, place_C), lax.fori_loop(0, blocks, add, jnp.zeros(_ROWS, out_ref.dtype)), asked_C)


def _block(width: int) -> int:
    return min(_WIDTH, pl.next_power_of_2(width))


def _columns(turn: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the columns of a block, and which of them there are."""
    column_W = turn * _block(width) + jnp.arange(_block(width))
    return column_W, column_W < width


def _load(ref: Any, at: tuple[Any, ...], inside: jax.Array) -> jax.Array:
    """The entries that are inside, and 0 elsewhere."""
    from jax.experimental.pallas import triton  # not at the top: a later JAX may come without it

    return triton.load(ref.at[at], mask=inside, other=jnp.zeros((), ref.dtype))


def _store(ref: Any, at: tuple[Any, ...], value: jax.Array, inside: jax.Array) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref.at[at], value, mask=inside)


def _launch(
    body: Any, out: list[jax.ShapeDtypeStruct], grid: tuple[int, ...], arrays: Sequence[jax.Array]
) -> list[Any]:
    """Runs the kernel, or interprets it, as the device that the program is compiled for asks."""
    from jax.experimental.pallas import triton

    def run(*arrays: jax.Array, **how: Any) -> list[jax.Array]:
        return pl.pallas_call(body, out_shape=out, grid=grid, **how)(*arrays)

    compiled = functools.partial(run, compiler_params=triton.CompilerParams(num_warps=4))
    return lax.platform_dependent(*arrays, cpu=functools.partial(run, interpret=True), default=compiled)
