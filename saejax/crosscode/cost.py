"""What the stage ``crosscode`` takes."""

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import pass_flops, weight_bytes
from saejax.settings import CorpusConfig, ModelConfig, TaskConfig
from saejax.stages.crosscode import CrosscodeConfig

_PROMPT_TOKENS = 32


def crosscode_cost(plan: PlannedRun, name: str) -> Cost:
    """Held-out rows encoded twice; both models, and a pass of one for each drawn set and behaviour."""
    config, task = plan.configs[CrosscodeConfig], plan.configs[TaskConfig]
    sizes = plan.dictionaries(config.dictionaries)
    largest = max(sizes, key=lambda size: size.n_features)
    held_out = round(plan.tokens * plan.configs[CorpusConfig].held_out)
    tokens = min(config.tokens or held_out, held_out)
    removed = len(task.behaviours) * task.test_prompts * config.draws if plan.configs[ModelConfig].other else 0
    encode = 2 * 4.0 * len(sizes) * tokens * largest.d_in * largest.n_features
    passes = len(sizes) * pass_flops(plan.model, removed * _PROMPT_TOKENS, _PROMPT_TOKENS, plan.model.n_layers)
    return Cost(
        DeviceBytes(
            2 * weight_bytes(plan.model, plan.axes, plan.dtype),
            activations=WIDTH["float32"] * config.batch_tokens * largest.n_features,
        ),
        encode + passes,
        overhead=0.5,
        host_seconds=START,
        counts=dict(rows=removed),
    )
