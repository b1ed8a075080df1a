"""What the stage ``transfer`` takes."""

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import weight_bytes
from saejax.stages.transfer import TransferConfig

_LOOKS = 2.5  # passes over all products that an assignment takes, on the benchmark's dictionaries
_SOLVE = 0.35  # seconds on the host of an assignment of 4,608 features


def transfer_cost(plan: PlannedRun, name: str) -> Cost:
    """Every two dictionaries by every measure, found and null."""
    config = plan.configs[TransferConfig]
    sizes = plan.dictionaries(config.dictionaries)
    pairs, largest = len(sizes) * (len(sizes) - 1) // 2, max(sizes, key=lambda size: size.n_features)
    assignments = 2 * pairs * len(config.measures)
    wide = config.tokens if "activity" in config.measures else largest.d_in
    products = 2.0 * assignments * _LOOKS * largest.n_features**2 * wide
    moved = pairs * 4 if config.reconstruction else 0
    encode = 4.0 * (moved + len(sizes)) * config.tokens * largest.d_in * largest.n_features
    rows = WIDTH["float32"] * largest.n_features * (2 * wide + 512)
    reads = "activity" in config.measures or config.reconstruction
    return Cost(
        DeviceBytes(weight_bytes(plan.model, plan.axes, plan.dtype) if reads else 0, activations=rows),
        products + (encode if reads else 0.0),
        overhead=1.0,
        host_seconds=START + assignments * _SOLVE * (largest.n_features / 4608) ** 2,
        disk=assignments * 12 * largest.n_features,
        counts=dict(pairs=pairs, assignments=assignments),
    )
