"""What the stage ``interpret`` takes."""

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import dictionary_bytes, weight_bytes
from saejax.interpret.control import MOST
from saejax.parallel.mesh import part_size
from saejax.stages.interpret import InterpretConfig

_FIRING = 3e-6  # seconds on the host for each, measured
_FEATURE = 4e-3  # seconds on the host for each: contexts and their files
_RECORD = 10  # bytes of a firing on disk
_L0 = 64  # firings a token where the kind does not say


def interpret_cost(plan: PlannedRun, kind: str) -> Cost:
    """Every member encodes all tokens once, beside a frozen-random dictionary of its size, then random directions.

    The firings of all of them pass through files.
    """
    stack, config = plan.stacks[kind], plan.configs[InterpretConfig]
    used, members = stack.dictionary, len(stack.members)
    firings = plan.tokens * (used.k or _L0)
    encode = 2.0 * plan.tokens * used.d_in * (2 * used.n_features + min(MOST, used.n_features))
    batch = part_size(plan.axes, (config.batch_tokens, used.n_features), "data", "model")
    model = weight_bytes(plan.model, plan.axes, plan.dtype)
    return Cost(
        DeviceBytes(model, 2 * dictionary_bytes(used, "float32"), activations=6 * WIDTH["float32"] * batch),
        members * encode,
        overhead=0.3,
        host_seconds=START + members * (2 * _FIRING * firings + _FEATURE * used.n_features),
        disk=2 * _RECORD * firings + 6000 * members * used.n_features,
        batches=dict(tokens=config.batch_tokens),
    )
