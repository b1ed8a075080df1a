"""Roughly how long a run takes and how much it writes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from saejax.preflight.costs import head_flops, pass_flops, step_flops
from saejax.preflight.work import Work
from saejax.settings import CorpusConfig
from saejax.tasks.corpora import Document

_CHARACTERS_PER_TOKEN = 4.2  # English text under a vocabulary of about 50,000
_EFFICIENCY = dict(baseline=0.4, capture=0.35, train=0.5, evaluate=0.4, ablate=0.3)  # of the measured matmul rate


def corpus_tokens(documents: Sequence[Document], config: CorpusConfig) -> int:
    """About how many tokens of the corpus are used."""
    tokens = round(sum(len(document.text) for document in documents) / _CHARACTERS_PER_TOKEN)
    return min(tokens, config.max_tokens or tokens)


def disk_bytes(work: Work, tokens: int) -> int:
    """What the run writes: the store, and for every dictionary two checkpoints and the arrays."""
    width = 2 if work.stored == "bfloat16" else 4
    store = tokens * sum(site.width(work.model) * width + 16 for site in work.sites)
    dictionary = 4 * 2 * work.tested.n_features * work.tested.d_in
    return store + work.dictionaries * 7 * dictionary


def stage_seconds(work: Work, configs: Mapping[str, Any], tokens: int, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the main stages on the devices whose matmul rates these are.

    Args:
      work: what is run.
      configs: the groups of configuration.
      tokens: of the corpus.
      rates: FLOP/s of matrix products, by dtype.
    """
    task, train, ablate = configs["task"], configs["train"], configs["ablate"]
    model, site = work.model, work.site
    above = model.n_layers - site.layer - 1
    prompts = len(task.behaviours) * (task.train_prompts + task.test_prompts)
    rows = len(task.behaviours) * task.test_prompts * (ablate.draws + ablate.top * 2 + 1)
    steps = min(train.epochs * tokens, train.max_steps * train.batch or train.epochs * tokens)
    scored = configs["evaluate"].ce_documents * work.scored[1]
    deepest = max(site.layer for site in work.sites) + 1
    flops = dict(
        baseline=(work.dtype, pass_flops(model, 2 * prompts * work.prompt, work.prompt, model.n_layers)),
        capture=(work.capture, pass_flops(model, tokens, work.batch[1], deepest)),
        train=(train.matmul, work.dictionaries * step_flops(steps, work.tested.d_in, work.tested.n_features)),
        evaluate=(
            work.dtype,
            pass_flops(model, scored, work.scored[1], len(work.stacks) * (site.layer + 3 * (above + 1)))
            + 3 * len(work.stacks) * head_flops(model, scored)
            + work.dictionaries * (pass_flops(model, scored, work.scored[1], above + 1) + head_flops(model, scored)),
        ),
        ablate=(work.dtype, pass_flops(model, rows * work.prompt, work.prompt, above)),
    )
    return {stage: count / (_EFFICIENCY[stage] * rates[dtype]) for stage, (dtype, count) in flops.items()}


def matmul_rates(size: int = 1536, repeats: int = 4) -> dict[str, float]:
    """Measured FLOP/s of matrix products of this size, by dtype of the operands, all devices together."""
    return {dtype: _rate(dtype, size, repeats) for dtype in ("float32", "bfloat16")}


def _rate(dtype: str, size: int, repeats: int) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        product(a, a).block_until_ready()
    rate = repeats * 2 * size**3 / (time.perf_counter() - start)
    return rate * (1 if jax.devices()[0].platform == "cpu" else jax.device_count())
