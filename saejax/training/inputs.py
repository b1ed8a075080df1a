"""Where the trainer's batches come from: a store, read from disk while it trains or resident on the devices.

Both give the same rows in the same order to the same step. On a CPU they give the same bits, on any mesh; on other
devices XLA may choose other kernels for a step alone than for one of many in a program, and they agree to rounding.
"""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.activations.batches import READ_OPTIONS, BatchOrder, Parts, sites_of
from saejax.activations.store import Store
from saejax.errors import UserError
from saejax.parallel.collectives import from_first_process
from saejax.parallel.mesh import free_bytes, sharding
from saejax.training.members import Hyper
from saejax.training.objective import Arrays
from saejax.training.placement import placed, resident_bytes
from saejax.training.step import Trainer, TrainState

_SHARE = 0.4  # of the memory that is free once the state is placed, which "auto" gives to activations
_LONGEST = 64  # most steps of one program
_SECONDS = 0.5  # that a program should take, so that a request to stop is heard soon


class Input(Protocol):
    """Runs the trainer's steps on its batches. ``mode`` is its name, as in ``--train.input``."""

    mode: str

    def advance(self, state: TrainState, step: int, last: int) -> tuple[TrainState, Arrays, int]:
        """Runs at least one step and none beyond the ``last``; does not wait for them.

        Args:
          state: after ``step`` steps; donated.
          step, last: step < last.

        Returns:
          The next state; metrics [M], or [N, M] of which the first rows are the steps that ran; how many ran: 0 only if
          the process was asked to stop.
        """
        ...


class Streamed:
    """Batches that are read ahead by threads, a program for each step.

    Args:
      batches: of each batch the rows ``own_rows``, arrays [sites, rows, d], from the first step wanted on.
    """

    mode = "streamed"

    def __init__(self, trainer: Trainer, batches: Iterable[tuple[np.ndarray, ...]]):
        self._trainer, self._batches = trainer, iter(batches)
        self._first = own_rows(trainer).start

    def advance(self, state: TrainState, step: int, last: int) -> tuple[TrainState, Arrays, int]:
        """One step, as ``Input.advance`` says."""
        state, metrics = self._trainer.step(state, tuple(self._placed(part) for part in next(self._batches)))
        return state, metrics, 1

    def _placed(self, part_SxRxD: np.ndarray) -> jax.Array:
        """The whole batch on the devices, of which this process gives what its own hold."""
        batch, first = self._trainer.config.batch, self._first

        def held(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(batch)
            return part_SxRxD[index[0], start - first : stop - first, index[2]]

        shape = (part_SxRxD.shape[0], batch, part_SxRxD.shape[2])
        return jax.make_array_from_callback(shape, self._trainer.batch_sharding, held)


def own_rows(trainer: Trainer) -> slice:
    """The rows of each batch that this process's devices hold, and what lies between."""
    batch, where = trainer.config.batch, trainer.batch_sharding
    held = where.addressable_devices_indices_map((len(trainer.sites), batch, 1)).values()
    ends = [index[1].indices(batch) for index in held if index]
    return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))


class Resident:
    """Rows that stand on the devices.

    The host sends the places of each batch's rows, and one program runs as many steps as take about half a second. How
    many is an argument of the program: it compiles once, and the bits do not depend on where a run was interrupted.

    Args:
      parts: of ``placed``, for each part of a batch; bfloat16 may be uint16.
      places: gives the places [batch] among those rows of the batch that a step, from 0, takes.

    Attributes:
      parts: may be replaced by others of the same shapes.
    """

    mode = "resident"

    def __init__(self, trainer: Trainer, parts: tuple[jax.Array, ...], places: Callable[[int], np.ndarray]):
        self._trainer, self.parts, self._places = trainer, parts, places
        self._calls, self._count = 0, 1
        shardings = (trainer.shardings, sharding(trainer.mesh))
        self.compiled = jax.jit(self._steps, donate_argnums=0, out_shardings=shardings)

    def advance(self, state: TrainState, step: int, last: int) -> tuple[TrainState, Arrays, int]:
        """As many steps as take half a second, as ``Input.advance`` says. The first two calls are waited for."""
        start, count = time.monotonic(), min(self._count, last - step)
        places_NxB = np.zeros((_LONGEST, self._trainer.config.batch), np.int32)
        for i in range(count):
            places_NxB[i] = self._places(step + i)
        state, metrics = self.compiled(state, self._trainer.hyper, self.parts, places_NxB, np.int32(count))
        if self._calls < 2:  # the first compiles, the second is timed
            jax.block_until_ready(metrics)
            if self._calls == 1:
                fitting = np.clip(_SECONDS / (time.monotonic() - start), 1, _LONGEST)
                self._count = int(from_first_process(np.int32(fitting)))
            self._calls += 1
        return state, metrics, count

    def _steps(
        self, state: TrainState, hyper: Hyper, parts: tuple[jax.Array, ...], places_NxB: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Arrays]:
        """The first ``count`` steps, in a loop whose length the compiler does not know."""
        step = self._trainer.pure_step

        def one(i: jax.Array, carry: tuple[TrainState, Arrays]) -> tuple[TrainState, Arrays]:
            state, recorded = carry
            state, metrics = step(state, hyper, self._batch(parts, places_NxB[i]))
            return state, {name: recorded[name].at[i].set(value_M) for name, value_M in metrics.items()}

        _, metrics = jax.eval_shape(lambda: step(state, hyper, self._batch(parts, places_NxB[0])))
        empty = {name: jnp.zeros((_LONGEST, *leaf.shape), leaf.dtype) for name, leaf in metrics.items()}
        return lax.fori_loop(0, count, one, (state, empty))

    def _batch(self, parts: tuple[jax.Array, ...], places_B: jax.Array) -> tuple[jax.Array, ...]:
        """The rows of a batch, placed as a streamed one is."""
        picked = (jnp.take(rows_SxRxD, places_B, axis=1, mode="clip") for rows_SxRxD in parts)
        placed = (lax.with_sharding_constraint(part, self._trainer.batch_sharding) for part in picked)
        return tuple(lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x for x in placed)


def make_input(
    trainer: Trainer,
    store: Store,
    parts: Parts,
    first_step: int,
    before: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Input:
    """The input that ``--train.input`` asks for; to be called when the state is on the devices.

    Args:
      trainer: gives the step and the settings.
      parts: the sites of every part of a batch.
      first_step: where training starts or goes on.
      before: "resident" or "streamed", which "auto" was in the run that goes on: it stays that.

    Raises:
      UserError: the activations are to be resident and are more than what is free.
    """
    config = trainer.config
    usable = store.usable("train", *sites_of(parts))
    needed, free = resident_bytes(trainer, store, parts, len(usable)), free_bytes(trainer.mesh)
    mode = config.input
    if mode == "auto":
        fits = needed <= _SHARE * free and not _on_cpu(trainer.mesh)
        mode = before or ("resident" if from_first_process(np.int32(fits)) else "streamed")
    if mode == "resident" and not from_first_process(np.int32(needed <= free)):
        raise UserError(
            f"--train.input=resident would put {needed / 1e9:.2f} GB of activations on each device, of which "
            f"{free / 1e9:.2f} GB are free: use --train.input=streamed, or more devices on --mesh.data"
        )
    if mode == "streamed":
        arguments = (config.batch, config.seed[0], config.epochs, config.buffer_rows)
        batches = store.batches(parts, *arguments, own_rows(trainer))
        return Streamed(trainer, iter(batches[first_step:].to_iter_dataset(READ_OPTIONS)))
    say(f"activations are resident: {needed / 1e9:.3f} GB on each device of {free / 1e9:.1f} GB free")
    held = tuple(placed(trainer, store, part, usable.rows()) for part in parts)
    order = BatchOrder(usable, config.batch, config.seed[0], config.epochs, config.buffer_rows)
    return Resident(trainer, held, order.ranks)


def _on_cpu(mesh: Mesh) -> bool:
    """Whether the devices are CPUs: their memory is the host's, and XLA runs a step in a loop more slowly there."""
    return mesh.devices.flat[0].platform == "cpu"
