"""Runs of the training loop in a folder, on rows that stand in memory in place of a store."""

import numpy as np
from small_stacks import B, D
from small_stacks import make_trainer as make_small

from saejax.activations.batches import BatchOrder, RowRange
from saejax.activations.store import Store
from saejax.training.checkpoints import Checkpoints
from saejax.training.inputs import Resident, Streamed
from saejax.training.loop import Metrics, train
from saejax.training.placement import placed

STEPS, ROWS, SEED = 12, 5 * B + 7, 3  # three epochs of five batches, of which the last is not begun
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

    batches = Store.batches

    def read(self, site, rows, out=None):
        values = self.values[rows] * (1 + int(site.rpartition(".")[2]))
        values = values[:, ::-1] if site.startswith("mlp_out") else values
        if out is not None:
            out[:] = values
        return values


def make_trainer(kind="topk", mesh=None, **changes):
    return make_small(kind, mesh, steps=STEPS, **dict(auxk=0.03, dead_tokens=64) | changes)


def site_parts(trainer):
    inputs, targets = zip(*trainer.sites, strict=True)
    return (inputs,) if inputs == targets else (inputs, targets)


def streamed(trainer, store, first=0):
    batches = (
        tuple(np.stack([store.read(site, ORDER.rows(step)) for site in part]) for part in site_parts(trainer))
        for step in range(first, STEPS)
    )
    return Streamed(trainer, batches)


def resident(trainer, store, first=0):
    rows = store.rows("train")
    return Resident(trainer, tuple(placed(trainer, store, part, rows) for part in site_parts(trainer)), ORDER.ranks)


def go(folder, trainer, make_source=streamed, store=None, stop_after=None, every=100, log_every=1, writers=()):
    """Trains in ``folder`` from where it was; gives the final state."""
    checkpoints = Checkpoints(folder / "checkpoints")
    first = checkpoints.latest_step or 0
    state = checkpoints.restore(trainer.abstract_state) if first else trainer.initial_state()
    names = [member.name for member in trainer.members]
    metrics = Metrics(folder / "metrics.jsonl", first, B, log_every, STEPS, names, lambda line: None, writers)
    asked = []

    def stopping():
        asked.append(1)
        return stop_after is not None and first + len(asked) >= stop_after

    source = make_source(trainer, store or Rows(), first)
    try:
        return train(source, state, first, STEPS, metrics, checkpoints, every, stopping)
    finally:
        checkpoints.close()
