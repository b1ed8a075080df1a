"""Cost of the stages ``tokenize`` and ``capture``."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.activations.chunker import SPLITS
from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import layer_bytes, parameters, pass_flops, weight_bytes
from saejax.costs.programs import Program, abstract_params, by_row
from saejax.models.language_model import forward
from saejax.models.sites import Site
from saejax.settings import CaptureConfig, CorpusConfig

_OVERHEAD = 0.2
_TOKENIZED_PER_SECOND = 500_000  # by two cores


def tokenize_cost(plan: PlannedRun, name: str) -> Cost:
    """Return the cost of all text once, on the host; each token is on disk twice until it has its place."""
    return Cost(host_seconds=plan.tokens / _TOKENIZED_PER_SECOND, disk=8 * plan.tokens)


def capture_cost(plan: PlannedRun, name: str) -> Cost:
    """Return the cost of capturing the text, or a sample of it, once."""
    capture = plan.configs[CaptureConfig]
    tokens = min(plan.tokens, len(SPLITS) * capture.tokens or plan.tokens)
    kept, flops = reading_cost(plan, plan.sites, tokens)
    width = WIDTH[capture.store_dtype]
    return Cost(
        kept,
        flops,
        plan.capture_dtype,
        _OVERHEAD,
        START,
        disk=min(recorded_rows(plan), tokens) * sum(site.width(plan.model) * width + 16 for site in plan.sites),
    )


def reading_cost(plan: PlannedRun, sites: Sequence[Site], tokens: int) -> tuple[DeviceBytes, float]:
    """Return bytes and FLOP of tokens up to the last of the sites; torch reads all layers, onto one device."""
    model, (rows, length) = plan.model, batch_shape(plan)
    layers = 1 + max((site.layer for site in sites), default=0)
    if plan.backend == "jax":
        kept = weight_bytes(model, plan.axes, plan.capture_dtype, layers)
    else:
        kept = WIDTH[plan.capture_dtype] * parameters(model)
    come_and_go = layer_bytes(plan, rows, length, plan.capture_dtype, kept=2 * len(sites))
    of_document = min(length, -(-plan.tokens // max(plan.documents, 1)))
    return DeviceBytes(model=kept, activations=come_and_go), pass_flops(model, tokens, of_document, layers)


def capture_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the program of the JAX decoder's forward pass."""
    rows, length = batch_shape(plan)
    rows += -rows % (mesh.shape["member"] * mesh.shape["data"])
    layers = 1 + max((site.layer for site in plan.sites), default=0)
    params = abstract_params(plan.model, mesh, plan.capture_dtype, layers)
    ids_BxT, lengths_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    return [
        Program(
            "capture: forward",
            f"{rows} x {length} tokens to layer {layers - 1}",
            forward,
            (plan.model, plan.sites, False, params, ids_BxT, lengths_B),
            (),
            pass_flops(plan.model, rows * length, length, layers),
        )
    ]


def recorded_rows(plan: PlannedRun) -> int:
    """Estimate the number of rows that all of the text gives: all tokens, or the last ones of every document."""
    last = plan.configs[CaptureConfig].last
    pieces = max(plan.documents, -(-plan.tokens // batch_shape(plan)[1]))
    return min(plan.tokens, last * pieces) if last else plan.tokens


def batch_shape(plan: PlannedRun) -> tuple[int, int]:
    """Return rows and length of a batch of documents."""
    length = min(plan.configs[CorpusConfig].context, plan.model.context)
    return max(1, plan.configs[CaptureConfig].batch_tokens // length), length
