"""What the stage ``ground_truth`` takes."""

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import step_flops
from saejax.ground_truth.rows import SITE
from saejax.settings import TrainConfig
from saejax.stages.ground_truth import CONTROLS, TruthConfig
from saejax.training.members import members

_OVERHEAD = 0.45  # as of the stage train
# Drawing an activation, and its part of the vector, takes as long on a CPU as so many operations of a product in
# float32: 6 to 7 of a core's nanoseconds, measured where its products ran at 85 GFLOP/s.
_DRAW = 550


def truth_cost(plan: PlannedRun, name: str) -> Cost:
    """Training of all members on the samples, which are drawn as they are needed, and a pass over the held-out ones."""
    truth, train = plan.configs[TruthConfig], plan.configs[TrainConfig]
    d, widths = truth.dimensions, [one.features_of(truth.dimensions) for one in train.each_expansion()]
    f = max(widths)
    count = len(members(train, train.kinds[0] if name == CONTROLS else name, [SITE]))  # of each expansion
    seen = truth.samples * train.epochs
    seen = min(seen, train.max_steps * train.batch or seen)
    products = count * sum(step_flops(seen, d, width) + 4.0 * truth.held_out * d * width for width in widths)
    drawn = (
        len(widths) * (seen + truth.held_out * count) * truth.features * _DRAW
    )  # in float32, whatever training takes
    arrays = count * WIDTH[train.state_dtype] * 2 * d * f
    return Cost(
        DeviceBytes(
            dictionary=arrays,
            optimizer=3 * arrays,
            activations=4 * (2 * train.batch * (d + f) + 6 * train.batch * truth.features + truth.features * d),
        ),
        products,
        train.matmul,
        _OVERHEAD + drawn / products,
        START,
        disk=count * 7 * 4 * 2 * d * sum(widths),
        counts=dict(samples=seen, members=count),
    )
