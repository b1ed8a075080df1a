"""How fast this machine is, and how much text there is."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from saejax.costs.cost import CHARACTERS_PER_TOKEN
from saejax.settings import CorpusConfig
from saejax.tasks.corpora import Document


def used_text(documents: Sequence[Document], config: CorpusConfig) -> tuple[int, int]:
    """About how many documents of the corpus are used, and how many tokens they have."""
    tokens = round(sum(len(document.text) for document in documents) / CHARACTERS_PER_TOKEN)
    used = min(tokens, config.max_tokens or tokens)
    return -(-len(documents) * used // max(tokens, 1)), used


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
