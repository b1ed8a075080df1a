"""Setup shared by the training benchmarks: stacks of any shape, activations to train on, and timed steps."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.kinds import by_name
from saejax.parallel.mesh import make_mesh
from saejax.training.members import make_members
from saejax.training.scales import SiteScale
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack
from saejax.training.state import init_state
from saejax.training.step import compile_step

SITE = "resid_post.0"


def make_stack(
    kind: str,
    d: int,
    features: int,
    batch: int,
    k: int,
    matmul: str,
    seeds: Sequence[int] = (0,),
    steps: int = 1000,
    products: str = "auto",
    **settings,
) -> TrainStack:
    """Return a stack with a member for each seed, on all devices; top-k kinds have AuxK."""
    topk = kind in ("topk", "batchtopk", "matryoshka")
    usual = dict(k=(k,), l1=(0.5,), auxk=1 / 32 if topk else 0.0, dead_tokens=10_000_000)
    config = TrainConfig(sites=(SITE,), batch=batch, matmul=matmul, seed=tuple(seeds), **usual | settings)
    members = make_members(config, kind, config.sites)
    dictionary = DictionaryConfig(
        kind=kind,
        site=SITE,
        d_in=d,
        n_features=features,
        **by_name(kind).facts(members[0].settings, config.of_kind(kind), features),
    )
    scales = [SiteScale(1.0, 1.0, np.zeros(d))] * len(members)
    return TrainStack(config, dictionary, members, scales, steps, make_mesh(), products)


def sparse_sums(batches: int, batch: int, d: int, directions: int = 2048, seed: int = 0) -> np.ndarray:
    """Return sparse sums of random directions and some noise, of mean norm sqrt(d), [batches, batch, d]."""
    rng = np.random.default_rng(seed)
    directions_NxD = rng.standard_normal((directions, d), np.float32) / np.sqrt(d)
    x_NxBxD = np.empty((batches, batch, d), np.float32)
    for place in range(batches):
        codes_BxN = rng.standard_exponential((batch, directions), np.float32) * (rng.random((batch, directions)) < 0.01)
        x_NxBxD[place] = codes_BxN @ directions_NxD + 0.1 * rng.standard_normal((batch, d), np.float32)
    return x_NxBxD * np.sqrt(d, dtype=np.float32) / np.linalg.norm(x_NxBxD, axis=-1).mean()


def matmul_rate(dtype: str, batch: int, d: int, features: int, repeats: int = 3) -> float:
    """Return FLOP/s of the encoder's product [B, D] x [D, F], or of a square one if faster; sums are in fp32.

    Operands in float32 are multiplied as such, and not as the TF32 of GPUs.
    """
    precision = "highest" if dtype == "float32" else "default"
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32))
    best = 0.0
    for rows, inner, columns in ((batch, d, features), (1024, 1024, 1024)):
        a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product(a, b).block_until_ready()
        start = time.perf_counter()
        for _ in range(repeats):
            product(a, b).block_until_ready()
        best = max(best, 2.0 * rows * inner * columns * repeats / (time.perf_counter() - start))
    return best


class Stepper:
    """A training run on batches in memory.

    Args:
      stack: of one site.
      batches: [N, B, D], taken in turn.
    """

    def __init__(self, stack: TrainStack, batches: np.ndarray):
        self._stack, self._batches, self._step = stack, batches, compile_step(stack)
        self._state, self._next = init_state(stack), 0

    def run(self, steps: int) -> float:
        """Return the seconds of ``steps`` steps, copying batches to the devices included."""
        start, metrics = time.perf_counter(), None
        for _ in range(steps):
            batch = self._batches[self._next % len(self._batches)][None]
            placed = (jax.make_array_from_process_local_data(self._stack.batch_sharding, batch),)
            self._state, metrics = self._step(self._state, self._stack.hyperparams, placed)
            self._next += 1
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start
