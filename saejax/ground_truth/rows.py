"""Vectors of a synthetic world in the place of activations: what the trainer reads of them, and its batches.

A batch is drawn on the devices from its number alone, so a run that goes on needs nothing but its step.
"""

import functools

import jax
import numpy as np

from saejax.activations.manifest import CapturedModel
from saejax.ground_truth.sampling import draw
from saejax.ground_truth.world import World
from saejax.parallel.mesh import fitting_sharding
from saejax.runner.config import identity
from saejax.runner.workspace import fingerprint
from saejax.stages.ground_truth import TruthConfig
from saejax.training.objective import Arrays
from saejax.training.state import TrainState
from saejax.training.step import Trainer
from saejax.training.train import Source

SITE = "synthetic.0"
TRAIN, HELD_OUT = 1, 2  # which vectors: the numbers of a batch start anew in each
_SAMPLE = 65_536  # vectors from which the trainer estimates scales
_NOT_OF_THE_WORLD = ("samples", "held_out", "frequent")  # settings: how much of it is seen, and how it is judged


@jax.jit(static_argnums=(0, 1))
def batch_key(seed: int, split: int, number: int | jax.Array) -> jax.Array:
    """The key of the batch of a number in a split, ``TRAIN`` or ``HELD_OUT``, of the world of a seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split), number)


class SyntheticRows:
    """What training knows of the vectors beforehand, as ``scales.ScaledRows``.

    Args:
      config: of the world.
      world: the world.
      batch: vectors of a batch.
    """

    sites = (SITE,)

    def __init__(self, config: TruthConfig, world: World, batch: int):
        self._world, self._batch = world, batch
        self._key = functools.partial(batch_key, config.seed, TRAIN)
        self._count = max(min(config.samples, _SAMPLE) // batch, 1) * batch
        own = {name: value for name, value in identity(config).items() if name not in _NOT_OF_THE_WORLD}
        self.model = CapturedModel("synthetic", "", fingerprint(own))

    def d(self, site: str) -> int:
        """Width of a vector."""
        return self._world.directions_JxD.shape[1]

    def max_norm(self, site: str) -> float:
        """No vector is an attention sink."""
        return 3.4e38

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Numbers of the first vectors to train on."""
        return np.arange(self._count)

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """The vectors [n, d] of these numbers."""
        numbers = range(self._count // self._batch)
        made = [np.asarray(draw(self._world, self._key(number), self._batch)) for number in numbers]
        return np.concatenate(made)[rows]


class Sampled:
    """Batches of a synthetic world, as ``inputs.Input``: drawn on the devices, step by step.

    Every epoch has the same batches, each but the first in another order.

    Args:
      trainer: gives the step.
      config: of the world.
      world: the world.
    """

    mode = "synthetic"

    def __init__(self, trainer: Trainer, config: TruthConfig, world: World):
        batch = trainer.config.batch
        self._trainer, self._world, self._per_epoch = trainer, world, config.samples // batch
        self._key = functools.partial(batch_key, config.seed, TRAIN)
        self._rows = fitting_sharding(trainer.mesh, (batch, 1), "data", None)

    def advance(self, state: TrainState, step: int, last: int) -> tuple[TrainState, Arrays, int]:
        """One step, as ``Input.advance`` says."""
        key = self._key(np.int32(self._number(step)))
        x_BxD = draw(self._world, key, self._trainer.config.batch, self._rows)
        state, metrics = self._trainer.step(state, (x_BxD[None],))
        return state, metrics, 1

    def _number(self, step: int) -> int:
        epoch, place = divmod(step, self._per_epoch)
        return int(_order(self._trainer.config.seed[0], epoch, self._per_epoch)[place])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The numbers of an epoch's batches in their order."""
    return np.random.default_rng([seed, epoch]).permutation(count) if epoch else np.arange(count)


def synthetic_source(config: TruthConfig, world: World, batch: int) -> Source:
    """The vectors of a world for ``train.train_stack``."""
    rows = SyntheticRows(config, world, batch)
    return Source(rows, config.samples // batch, lambda trainer, first_step, before: Sampled(trainer, config, world))
