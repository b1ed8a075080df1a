"""Measured speed of this machine, and the amount of text."""

import functools
import itertools
import time

import jax
import jax.numpy as jnp

from saejax.costs.plan import CHARACTERS_PER_TOKEN
from saejax.tasks.corpora import characters, documents, read_corpus
from saejax.tasks.settings import CorpusConfig, TaskConfig

_SAMPLE = 1000  # documents of a stream, from which their length is taken
_ENOUGH = 0.25  # seconds of products of a dtype after which they are not repeated
_CHAIN = 8  # products of one program, so that the time of its dispatch does not count


def used_text(config: CorpusConfig, task: TaskConfig) -> tuple[int, int]:
    """Estimate how many documents of the corpus are used, and how many tokens they have.

    Of a stream the first documents and the sizes of its files tell; where these are not known, ``max_tokens`` alone.
    """
    sample = list(itertools.islice(documents(config, task), _SAMPLE)) if config.stream else read_corpus(config, task)
    of_sample = round(sum(document.size for document in sample) / CHARACTERS_PER_TOKEN)
    of_all = round(characters(config, task) / CHARACTERS_PER_TOKEN) if config.stream else of_sample
    used = min(filter(None, (of_all, config.max_tokens)), default=0)
    return -(-len(sample) * used // max(of_sample, 1)), used


def matmul_rates(size: int = 1536, repeats: int = 3) -> dict[str, float]:
    """Measure matrix products at the precision that training asks for.

    Args:
      size: rows and columns of the matrices.
      repeats: the most runs, of which the fastest counts; after a run that takes long there is no other.

    Returns:
      FLOP/s of all devices together, by dtype of the operands.
    """
    return {dtype: _rate(dtype, size, repeats) for dtype in ("float32", "bfloat16")}


def _rate(dtype: str, size: int, repeats: int) -> float:
    precision = "highest" if dtype == "float32" else "default"  # otherwise a GPU would multiply fp32 as TF32
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)

    @jax.jit
    def chain(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _CHAIN, lambda _, x: product(x, a).astype(dtype) / size, a)

    a = jnp.ones((size, size), dtype)
    chain(a).block_until_ready()
    runs: list[float] = []
    while len(runs) < repeats and sum(runs) < _ENOUGH:
        start = time.perf_counter()
        chain(a).block_until_ready()
        runs.append(time.perf_counter() - start)
    devices = 1 if jax.devices()[0].platform == "cpu" else jax.device_count()  # CPU devices share the cores
    return devices * _CHAIN * 2 * size**3 / min(runs)
