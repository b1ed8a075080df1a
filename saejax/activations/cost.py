"""What the stage ``capture`` takes."""

import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, Scene
from saejax.costs.passes import layer_bytes, parameters, pass_flops, weight_bytes
from saejax.costs.programs import Program, abstract_params, by_row
from saejax.models.language_model import forward

_OVERHEAD = 0.2


def capture_cost(scene: Scene, name: str) -> Cost:
    """The text once, up to the last captured layer; torch reads all layers, onto one device."""
    capture, model, (rows, length) = scene.configs["capture"], scene.model, _batch(scene)
    layers = 1 + max((site.layer for site in scene.sites), default=0)
    if scene.backend == "jax":
        kept = weight_bytes(model, scene.axes, capture.dtype, layers)
    else:
        kept = WIDTH[capture.dtype] * parameters(model)
    come_and_go = layer_bytes(scene, rows, length, capture.dtype, kept=2 * len(scene.sites))
    of_document = min(length, -(-scene.tokens // max(scene.documents, 1)))
    flops = pass_flops(model, scene.tokens, of_document, layers)
    width = WIDTH[capture.store_dtype]
    return Cost(
        DeviceBytes(model=kept, activations=come_and_go),
        flops,
        capture.dtype,
        _OVERHEAD,
        START,
        disk=recorded_rows(scene) * sum(site.width(model) * width + 16 for site in scene.sites),
    )


def capture_programs(scene: Scene, mesh: Mesh) -> list[Program]:
    """The pass of the JAX decoder."""
    rows, length = _batch(scene)
    rows += -rows % mesh.shape["data"]
    layers = 1 + max((site.layer for site in scene.sites), default=0)
    params = abstract_params(scene.model, mesh, scene.configs["capture"].dtype, layers)
    ids_BxT, lengths_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    return [
        Program(
            "capture: forward",
            f"{rows} x {length} tokens to layer {layers - 1}",
            forward,
            (scene.model, scene.sites, False, params, ids_BxT, lengths_B),
            (),
            pass_flops(scene.model, rows * length, length, layers),
        )
    ]


def recorded_rows(scene: Scene) -> int:
    """About how many rows the store gets: all tokens, or the last ones of every document."""
    last = scene.configs["capture"].last
    pieces = max(scene.documents, -(-scene.tokens // _batch(scene)[1]))
    return min(scene.tokens, last * pieces) if last else scene.tokens


def _batch(scene: Scene) -> tuple[int, int]:
    """Rows and length of a batch of documents."""
    length = min(scene.configs["corpus"].context, scene.model.context)
    return max(1, scene.configs["capture"].batch_tokens // length), length
