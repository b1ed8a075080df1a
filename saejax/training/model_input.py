"""Batches straight from the model (``--train.source=model``): buffer after buffer, each resident in its turn.

The step's number says which buffer it reads and which of its rows. A run that goes on makes the first buffer again, for
scales and the sink rule, and then the one that it was in.
"""

import dataclasses

import numpy as np

from saejax.activations.batches import Parts, sites_of
from saejax.activations.device_buffers import check_room
from saejax.activations.joined import with_joined
from saejax.activations.stream import BufferOrder, ModelStream
from saejax.errors import Interrupted, UserError
from saejax.parallel.collectives import process_count
from saejax.runner.workspace import Run
from saejax.settings import TrainConfig
from saejax.training.inputs import Resident
from saejax.training.objective import Arrays
from saejax.training.placement import placed, resident_bytes
from saejax.training.step import Trainer, TrainState


def open_stream(run: Run, parts: Parts) -> ModelStream:
    """The stream of a run, with its first buffer made.

    Raises:
      UserError: several processes, values that pass through the host, a buffer smaller than a batch, or what
        ``ModelStream`` refuses.
      Interrupted: asked to stop.
    """
    config = run.configs[TrainConfig]
    if config.buffer_rows < config.batch:
        raise UserError(f"--train.buffer_rows={config.buffer_rows} is less than one batch of {config.batch}: raise it")
    several = process_count() > 1
    if several:  # all make a buffer together: a request to stop is heard between buffers, where all agree on it
        run = dataclasses.replace(run, stopping=lambda: False)
    stream = ModelStream(run, parts, config.buffer_rows)
    if several and stream.on_devices is None:
        raise UserError(
            "--train.source=model runs in several processes with --capture.backend=jax, one model and no joined sites "
            "alone: use --mesh.processes=1, or capture a store"
        )
    if not stream.fill(0):
        raise Interrupted("stopped before the first step: run the same command to start again")
    return with_joined(stream, sites_of(parts))


def buffer_order(config: TrainConfig, stream: ModelStream) -> BufferOrder:
    """The order in which a stream is trained on."""
    return BufferOrder([stream.size(i) for i in range(len(stream))], config.batch, config.seed[0])


class FromModel:
    """Batches of a stream's buffers, as ``inputs.Input``.

    Args:
      stream: whose first buffer is at hand.
      parts: the sites of every part of a batch.

    Raises:
      UserError: a buffer does not fit on the devices.
    """

    mode = "model"

    def __init__(self, trainer: Trainer, stream: ModelStream, parts: Parts):
        self._trainer, self._stream, self._parts = trainer, stream, parts
        self._order = buffer_order(trainer.config, stream)
        self._largest = max(stream.size(i) for i in range(len(stream)))
        if stream.on_devices is None:
            check_room(trainer.mesh, self._largest, resident_bytes(trainer, stream, parts, self._largest))
        self._runner = Resident(trainer, (), self._places)
        self._at_hand, self._epoch, self._first = 0, -1, 0  # the first buffer is made, but not yet on the devices
        self._batches = np.zeros((0, trainer.config.batch), np.int64)

    def advance(self, state: TrainState, step: int, last: int) -> tuple[TrainState, Arrays, int]:
        """As ``inputs.Input.advance`` says; no step where the process was asked to stop while a buffer was made."""
        epoch, buffer, first, stop = self._order.locate(step)
        if (epoch, buffer) != (self._epoch, self._at_hand) and not self._load(epoch, buffer, first):
            return state, {}, 0
        return self._runner.advance(state, step, min(last, stop))

    def _load(self, epoch: int, buffer: int, first: int) -> bool:
        """Puts a buffer on the devices; False if the process was asked to stop."""
        self._runner.parts = ()  # its memory is for the next
        if buffer != self._at_hand and not self._stream.fill(buffer):
            self._at_hand = -1
            return False
        trainer, stream = self._trainer, self._stream
        rows_R = stream.rows("train", *sites_of(self._parts))
        if not len(rows_R):
            raise UserError(
                f"all {stream.size(buffer)} tokens of buffer {buffer + 1} are attention sinks: raise "
                "--train.buffer_rows or --capture.sink_factor"
            )
        self._runner.parts = stream.on_devices or tuple(
            placed(trainer, stream, part, np.arange(stream.size(buffer)), self._largest) for part in self._parts
        )
        self._batches = rows_R[self._order.places(epoch, buffer, len(rows_R))]
        self._epoch, self._at_hand, self._first = epoch, buffer, first
        return True

    def _places(self, step: int) -> np.ndarray:
        """The rows of a batch, by their places in the buffer at hand."""
        return self._batches[step - self._first]
