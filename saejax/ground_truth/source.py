"""Vectors of a synthetic world as activations to train on.

They are drawn from the number of their batch alone, so a resumed run needs only its step.
"""

import functools

import jax
import numpy as np

from saejax.activations.manifest import CapturedModel
from saejax.config import counted
from saejax.files import fingerprint
from saejax.ground_truth.settings import TruthConfig
from saejax.ground_truth.world import HELD_OUT, TRAIN, World, batch_key, sample
from saejax.models.sinks import NO_SINKS
from saejax.parallel.mesh import fitting_sharding
from saejax.training.inputs import Source
from saejax.training.stack import TrainStack

SITE = "synthetic.0"
_SCALE_VECTORS = 65_536  # for the trainer's estimates of scales
_NOT_OF_THE_WORLD = ("truth.samples", "truth.held_out")  # settings of training and scoring


class SyntheticRows:
    """Vectors from which the trainer estimates scales and means; see ``scales.ScaledRows``."""

    sites = (SITE,)

    def __init__(self, config: TruthConfig, world: World, batch: int):
        self._world, self._batch, self._seed = world, batch, config.seed
        self._key = functools.partial(batch_key, config.seed, TRAIN)
        self._count = max(min(config.samples, _SCALE_VECTORS) // batch, 1) * batch
        self.model = CapturedModel("synthetic", "", fingerprint(counted(config, but=_NOT_OF_THE_WORLD)))

    def d(self, site: str) -> int:
        """Return the width of a vector."""
        return self._world.directions_JxD.shape[1]

    def max_norm(self, site: str) -> float:
        """Return a norm that no vector reaches: there are no attention sinks."""
        return NO_SINKS

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Return the numbers of the first training vectors."""
        return np.arange(self._count)

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these numbers, [n, d]."""
        batches = [
            np.asarray(sample(self._world, self._key(number), self._batch)[0])
            for number in range(self._count // self._batch)
        ]
        return np.concatenate(batches)[rows]

    def held_out(self, count: int, *sites: str) -> dict[str, np.ndarray]:
        """Return ``count`` held-out vectors [n, d]."""
        key = batch_key(self._seed, HELD_OUT, 0)
        return {site: np.asarray(sample(self._world, key, count)[0]) for site in sites}


class Sampled:
    """Batches of a synthetic world, drawn on the devices step by step; see ``inputs.Batches``.

    Every epoch has the same batches; from the second on in a new order.
    """

    def __init__(self, stack: TrainStack, config: TruthConfig, world: World):
        batch = stack.config.batch
        self._config, self._world, self._per_epoch = stack.config, world, config.samples // batch
        self._key = functools.partial(batch_key, config.seed, TRAIN)
        self._rows = fitting_sharding(stack.mesh, (batch, 1), "data", None)

    def batch(self, step: int) -> tuple[jax.Array, ...]:
        """Return the batch of a step."""
        key = self._key(np.int32(self._number(step)))
        return (sample(self._world, key, self._config.batch, self._rows)[0][None],)

    def _number(self, step: int) -> int:
        epoch, index = divmod(step, self._per_epoch)
        return int(_batch_order(self._config.seed[0], epoch, self._per_epoch)[index])


@functools.lru_cache(maxsize=2)
def _batch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the numbers of an epoch's batches in the order of training."""
    # The vectors are drawn at random, so the first pass needs no other order.
    return np.random.default_rng([seed, epoch]).permutation(count) if epoch else np.arange(count)


def synthetic_source(config: TruthConfig, world: World, batch: int) -> Source:
    """Return the vectors of a world as a source for ``train_stack``."""
    rows = SyntheticRows(config, world, batch)
    return Source(rows, config.samples // batch, lambda stack: Sampled(stack, config, world))
