"""What the stage ``cluster`` takes."""

from jax.sharding import Mesh

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import weight_bytes
from saejax.costs.programs import Program
from saejax.matching.transfer.stage_programs import encode_program, text_program
from saejax.settings import TrainConfig
from saejax.stages.cluster import ClusterConfig

_GROUPED = 2.5  # seconds on the host in which 4,608 features are compared in one view and grouped by both methods
_VIEWS = 3


def cluster_cost(plan: PlannedRun, name: str) -> Cost:
    """Every dictionary in every view: once, on samples, on shuffled data and on samples of these."""
    config = plan.configs[ClusterConfig]
    sizes = plan.dictionaries(config.dictionaries)
    largest = max(sizes, key=lambda size: size.n_features)
    looked = min(config.most, largest.n_features)
    times = _VIEWS * (1 + 3 * config.resamples) * len(sizes)
    encode = 2.0 * len(sizes) * config.tokens * largest.d_in * largest.n_features
    return Cost(
        DeviceBytes(
            weight_bytes(plan.model, plan.axes, plan.dtype) if plan.configs[TrainConfig].source == "model" else 0,
            activations=WIDTH["float32"] * config.batch_tokens * largest.n_features,
        ),
        encode,
        overhead=1.0,
        host_seconds=START + times * _GROUPED * (looked / 4608) ** 2,
        counts=dict(groupings=2 * times),
    )


def cluster_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The features of text, and the model that reads it where there is no store; groups are made on the host."""
    sizes = plan.dictionaries(plan.configs[ClusterConfig].dictionaries)
    if not sizes:
        return []
    found = [text_program(plan, mesh, "cluster", sizes)] if plan.configs[TrainConfig].source == "model" else []
    return [*found, encode_program(plan, mesh, "cluster", sizes)]
