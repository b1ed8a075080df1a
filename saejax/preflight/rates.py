"""How fast this machine is, and how much text there is."""

import itertools
import time

import jax
import jax.numpy as jnp

from saejax.costs.cost import CHARACTERS_PER_TOKEN
from saejax.settings import CorpusConfig, TaskConfig
from saejax.tasks.corpora import characters, documents, read_corpus

_SAMPLE = 1000  # documents of a stream, from which their length is taken


def used_text(config: CorpusConfig, task: TaskConfig) -> tuple[int, int]:
    """About how many documents of the corpus are used, and how many tokens they have.

    Of a stream the first documents and the sizes of its files tell; where these are not known, ``max_tokens`` alone.
    """
    sample = list(itertools.islice(documents(config, task), _SAMPLE)) if config.stream else read_corpus(config, task)
    of_sample = round(sum(len(document.text) for document in sample) / CHARACTERS_PER_TOKEN)
    of_all = round(characters(config, task) / CHARACTERS_PER_TOKEN) if config.stream else of_sample
    used = min(filter(None, (of_all, config.max_tokens)), default=0)
    return -(-len(sample) * used // max(of_sample, 1)), used


def matmul_rates(size: int = 1536, repeats: int = 6) -> dict[str, float]:
    """FLOP/s of matrix products of this size, the best of some, by dtype of the operands, all devices together."""
    return {dtype: _rate(dtype, size, repeats) for dtype in ("float32", "bfloat16")}


def _rate(dtype: str, size: int, repeats: int) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    devices = 1 if jax.devices()[0].platform == "cpu" else jax.device_count()  # CPU devices share the cores
    return devices * 2 * size**3 / best
