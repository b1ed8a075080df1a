"""Roughly how long a run takes and how much it writes.

A stage's operations are divided by the measured rate of matrix products and by the share of it that the stage
reached in whole runs of the demo on two CPU cores, on which the estimates were within a third.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from saejax.causal.ablate import nested
from saejax.causal.circuits import measure as circuits
from saejax.causal.screening import points
from saejax.evaluation.loss_recovered import VARIANTS
from saejax.preflight.causal import PROMPT, causal_units, count_all_behaviours, item_tokens
from saejax.preflight.costs import head_flops, pass_flops, step_flops
from saejax.preflight.work import Work
from saejax.settings import ESTIMATES, CorpusConfig
from saejax.tasks.benchmarks import definition
from saejax.tasks.corpora import Document

_CHARACTERS_PER_TOKEN = 4.2  # English text under a vocabulary of about 50,000
_START = 8.0  # seconds to load and compile, for every unit
_SHARES = dict(
    benchmark=dict(float32=0.6, bfloat16=0.4),
    baseline=dict(float32=0.6, bfloat16=0.4),
    torch=dict(float32=0.8, bfloat16=0.6),
    jax=dict(float32=0.9, bfloat16=0.5),
    train=dict(float32=0.7, bfloat16=0.4),
    evaluate=dict(float32=0.8, bfloat16=0.5),
    ablate=dict(float32=0.75, bfloat16=0.5),
    patch=dict(float32=0.75, bfloat16=0.5),
    probe=dict(float32=0.8, bfloat16=0.5),
    study=dict(float32=0.6, bfloat16=0.4),
    attribute=dict(float32=0.4, bfloat16=0.4),
)


def corpus_tokens(documents: Sequence[Document], config: CorpusConfig) -> int:
    """About how many tokens of the corpus are used."""
    tokens = round(sum(len(document.text) for document in documents) / _CHARACTERS_PER_TOKEN)
    return min(tokens, config.max_tokens or tokens)


def recorded_rows(work: Work, documents: int, tokens: int, last: int) -> int:
    """About how many rows the store gets: all tokens, or the last ones of every document."""
    pieces = max(documents, -(-tokens // work.batch[1]))
    return min(tokens, last * pieces) if last else tokens


def disk_bytes(work: Work, rows: int) -> int:
    """What the run writes: the store, and for every dictionary two checkpoints and the arrays."""
    width = 2 if work.stored == "bfloat16" else 4
    store = rows * sum(site.width(work.model) * width + 16 for site in work.sites)
    dictionary = 4 * 2 * work.tested.n_features * work.tested.d_in
    return store + work.dictionaries * 7 * dictionary


def stage_seconds(
    work: Work, configs: Mapping[str, Any], documents: int, tokens: int, rates: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of the stages that take long.

    Args:
      work: what is run.
      configs: the groups of configuration.
      documents, tokens: of the corpus.
      rates: FLOP/s of matrix products, by dtype.
    """
    model, task, train = work.model, configs["task"], work.train
    kinds, dictionaries = len(work.stacks), work.dictionaries
    rows = recorded_rows(work, documents, tokens, configs["capture"].last)
    steps_rows = min(train.epochs * rows, train.max_steps * train.batch or train.epochs * rows)
    texts = 2 * count_all_behaviours(task) * (task.train_prompts + task.test_prompts)  # each with its counterpart
    length = min(work.batch[1], -(-tokens // documents))
    deepest = 1 + max(site.layer for site in work.sites)
    flops = dict(
        baseline=(work.dtype, 1, pass_flops(model, texts * PROMPT, PROMPT, model.n_layers)),
        benchmark=(work.dtype, len(task.benchmarks), _benchmark_flops(work, configs)),
        capture=(work.capture, 1, pass_flops(model, tokens, length, deepest)),
        train=(train.matmul, kinds, dictionaries * step_flops(steps_rows, work.tested.d_in, work.tested.n_features)),
        evaluate=(
            work.dtype,
            kinds,
            _evaluate_flops(work, configs["evaluate"].ce_documents or documents // 10),
        ),
        ablate=(work.dtype, 1, _ablate_flops(work, configs)),
    )
    seconds = {}
    for stage, (dtype, units, count) in flops.items():
        shares = _SHARES[work.backend if stage == "capture" else stage]
        seconds[stage] = units * _START + count / (shares[dtype] * rates[dtype])
    for unit, part in causal_units(work, configs).items():
        stage = unit.partition("/")[0]
        took = _START + part.flops / (_SHARES[stage][work.dtype] * rates[work.dtype]) + part.host_seconds
        seconds[stage] = seconds.get(stage, 0.0) + took
    if graphs := work.graphs:  # all but the model's own products is fp32, whatever its dtype
        took = graphs.flops / (_SHARES["attribute"][work.dtype] * rates["float32"]) + graphs.read_seconds
        seconds["attribute"] = 2 * _START + took
    return {stage: value for stage, value in seconds.items() if value}


def _benchmark_flops(work: Work, configs: Mapping[str, Any]) -> float:
    """The prompts, once or once a choice; of generated answers every token, which costs about as much as four read."""
    task, length = configs["task"], configs["preflight"].benchmark_tokens
    tokens = 0
    for name in task.benchmarks:
        tokens += item_tokens(name, task, length) * (task.examples or definition(name).examples)
    return pass_flops(work.model, tokens, length, work.model.n_layers)


def _evaluate_flops(work: Work, documents: int) -> float:
    """Cross-entropy of full batches of held-out documents: the clean model and the floors once for each stack."""
    rows, length = work.scored
    tokens = -(-documents // rows) * rows * length
    tails = (len(VARIANTS) - 1) * len(work.stacks) + work.dictionaries
    layers = len(work.stacks) * work.site.layer + tails * (work.model.n_layers - work.site.layer)
    return pass_flops(work.model, tokens, length, layers) + tails * head_flops(work.model, tokens)


def _ablate_flops(work: Work, configs: Mapping[str, Any]) -> float:
    """The tail on every test prompt without each of the sets, and its gradient on every train prompt.

    About one row in six changes nothing and is not run. Where every feature is removed by itself, most rows are such:
    a feature fires on a few per cent of tokens.
    """
    task, ablate = configs["task"], configs["ablate"]
    sets = 0.85 * (ablate.draws + 4 * ablate.top + 1)  # the top features one by one, each with three of its like
    if ablate.curve:
        sets += 0.85 * (min(ablate.top, nested.SIZES) + nested.DRAWS * min(ablate.top, nested.CONTROL_SIZES))
    if ablate.circuit_tests:
        sets += 3 * circuits.DRAWS + ablate.top
    # Greedy sets: N steps over what is left of the candidates, on train prompts.
    grown = ablate.greedy * ((nested.CANDIDATES - 0.5) * ablate.greedy + 0.5) * task.train_prompts
    slopes = points(ablate.estimate) * task.train_prompts
    if ablate.effects == "all":
        sets += 0.2 * work.tested.n_features * (1 + len(ablate.compare))
        slopes += sum(map(points, ESTIMATES)) * task.test_prompts
    tokens = int(count_all_behaviours(task) * (task.test_prompts * sets + grown + 3 * slopes)) * PROMPT
    return pass_flops(work.model, tokens, PROMPT, work.model.n_layers - work.site.layer - 1)


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
