"""The program of the stage ``capture`` with shapes in place of arrays, and the size of its store."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.activations.chunker import SPLITS
from saejax.activations.jax_capture import read_sites
from saejax.activations.settings import CaptureConfig
from saejax.costs.plan import WIDTH, PlannedRun
from saejax.costs.programs import Program, abstract_params
from saejax.flops import pass_flops
from saejax.models.lengths import rows_per_batch
from saejax.models.settings import ModelConfig
from saejax.parallel.mesh import BY_DOCUMENT, document_devices
from saejax.tasks.settings import CorpusConfig


def capture_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the program of the JAX decoder's forward pass; none where the model runs in PyTorch."""
    if plan.configs[ModelConfig].backend == "torch" or not plan.sites:
        return []
    rows, length = batch_shape(plan, mesh)
    layers = 1 + max((site.layer for site in plan.sites), default=0)
    params = abstract_params(plan.model, mesh, plan.capture_dtype, layers)
    where = NamedSharding(mesh, PartitionSpec(BY_DOCUMENT))
    ids_BxT, lengths_B = (jax.ShapeDtypeStruct(s, jnp.int32, sharding=where) for s in ((rows, length), (rows,)))
    return [
        Program(
            "capture: forward",
            f"{rows} x {length} tokens to layer {layers - 1}",
            read_sites,
            (mesh, plan.model, plan.sites, params, ids_BxT, lengths_B),
            (),
            pass_flops(plan.model, rows * length, length, layers),
            captured_tokens(plan) / (rows * length),
        )
    ]


def captured_tokens(plan: PlannedRun) -> int:
    """Estimate the number of tokens that go through the model: all, or a sample of each split."""
    tokens = plan.configs[CaptureConfig].tokens
    return min(plan.tokens, len(SPLITS) * tokens or plan.tokens)


def store_bytes(plan: PlannedRun) -> int:
    """Estimate the bytes of the store: a row of each site, and 16 bytes of numbers, for each recorded token."""
    width = WIDTH[plan.configs[CaptureConfig].store_dtype]
    rows = min(recorded_rows(plan), captured_tokens(plan))
    return rows * sum(site.width(plan.model) * width + 16 for site in plan.sites)


def recorded_rows(plan: PlannedRun) -> int:
    """Estimate the number of rows that all of the text gives: all tokens, or the last ones of every document."""
    last = plan.configs[CaptureConfig].last
    pieces = max(plan.documents, -(-plan.tokens // _document_length(plan)))
    return min(plan.tokens, last * pieces) if last else plan.tokens


def batch_shape(plan: PlannedRun, mesh: Mesh) -> tuple[int, int]:
    """Return rows and length of a full batch of documents."""
    length, devices = _document_length(plan), document_devices(mesh)
    return rows_per_batch(plan.configs[CaptureConfig].batch_tokens * devices, length, devices), length


def _document_length(plan: PlannedRun) -> int:
    """Return the length of a document that is cut out of a longer text."""
    return min(plan.configs[CorpusConfig].context, plan.model.context)
