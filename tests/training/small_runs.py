"""Runs of the training loop in a folder, on rows that stand in memory in place of a store."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
from small_stacks import B, D, compiled
from small_stacks import make_stack as make_small

from saejax.activations.batches import BatchOrder, RowRange
from saejax.training.checkpoints import Checkpoints
from saejax.training.inputs import ResidentBatches, StreamedBatches, place_rows
from saejax.training.loop import LoopOutputs, train_loop
from saejax.training.metrics import METRICS, Metrics
from saejax.training.stack import batch_parts
from saejax.training.state import abstract_state, init_state

STEPS, ROWS, SEED = 12, 5 * B + 7, 123  # three epochs of five batches, of which the last is not begun
ORDER = BatchOrder(RowRange(0, ROWS, np.zeros(0, np.int64), ROWS), B, SEED, epochs=3, window_rows=ROWS)


class Rows:
    """What training reads of a store; a transcoder's targets are its inputs reversed."""

    def __init__(self, dtype=np.float32, rows=ROWS):
        self.values = np.random.default_rng(0).normal(size=(rows, D)).astype(dtype)
        self.dtype = np.dtype(dtype)

    def rows(self, split, *sites):
        return np.arange(len(self.values))

    def usable(self, split, *sites):
        return RowRange(0, len(self.values), np.zeros(0, np.int64), len(self.values))

    def d(self, site):
        return D

    def read(self, site, rows, out=None):
        values = self.values[rows] * (1 + int(site.rpartition(".")[2]))
        values = values[:, ::-1] if site.startswith("mlp_out") else values
        if out is not None:
            out[:] = values
        return values


def make_stack(kind="topk", mesh=None, **changes):
    usual = dict(warmup=1, auxk=0.03, dead_tokens=64, epochs=3, buffer_rows=ROWS, log_every=1, checkpoint_every=100)
    return make_small(kind, mesh, steps=STEPS, **usual | changes)


def streamed(stack, store):
    return StreamedBatches(stack, store)


def resident(stack, store):
    arrays = tuple(place_rows(stack, store, part, [store.rows("train")]) for part in batch_parts(stack.members))
    return ResidentBatches(stack, arrays, lambda step: ORDER.ranks(step)[None])


def go(folder, stack, make_batches=streamed, store=None, stop_after=None, wandb=None, step_fn=None):
    """Trains in ``folder`` from where it was; gives the final state."""
    checkpoints = Checkpoints(folder / "checkpoints")
    first = checkpoints.latest_step or 0
    state = checkpoints.restore(abstract_state(stack)) if first else init_state(stack)
    metrics = Metrics(stack, folder / METRICS, first, lambda line: None, wandb)
    steps = itertools.count(first + 1)

    def stopping():
        return stop_after is not None and next(steps) >= stop_after

    batches, outputs = make_batches(stack, store or Rows()), LoopOutputs(metrics, checkpoints)
    try:
        return train_loop(stack, state, batches, outputs, stopping, step_fn or compiled(stack))
    finally:
        checkpoints.close()


def records(folder: Path) -> list[dict]:
    """What a run wrote to its metrics."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same_bits(first, second) -> None:
    for leaf, expected in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected))
