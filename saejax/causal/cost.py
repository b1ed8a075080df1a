"""What the causal stages' costs share: prompts, the layers above a site, and prompts with an edit."""

from typing import Any

from saejax.costs.cost import START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import dictionary_bytes, feature_bytes, layer_bytes, weight_bytes
from saejax.dictionaries import DictionaryConfig
from saejax.interventions.split_model import GROUP_TOKENS, LENGTH_STEP, PROMPTS
from saejax.models.sites import Site
from saejax.settings import PreflightConfig, TaskConfig, TrainConfig

_OVERHEAD = 0.3
FIRING = 0.85  # of rows: a set that changes nothing on a prompt is not run


def prompt_length(plan: PlannedRun) -> int:
    """Tokens of a behaviour's prompt, padded, as memory is counted."""
    return -(-min(plan.configs[PreflightConfig].prompt_tokens, plan.model.context) // LENGTH_STEP) * LENGTH_STEP


def kept_prompts(plan: PlannedRun) -> int:
    """The prompts of a behaviour, filled up to whole runs of the head, or as many as one group holds."""
    task = plan.configs[TaskConfig]
    length = min(plan.configs[PreflightConfig].prompt_tokens, plan.model.context)
    most = max(GROUP_TOKENS // length // PROMPTS, 1)
    return PROMPTS * min(-(-max(task.train_prompts, task.test_prompts) // PROMPTS), most)


def layers_above(plan: PlannedRun, used: DictionaryConfig) -> int:
    """How many layers stand above a dictionary's site."""
    return plan.model.n_layers - Site.parse(used.site).layer - 1


def causal_cost(
    plan: PlannedRun, flops: float, activations: int, used: DictionaryConfig | None = None, **more: Any
) -> Cost:
    """A unit that holds the model and perhaps a dictionary, whole on every device.

    Args:
      flops: of the model's products.
      activations: bytes of what comes and goes.
      more: other fields of ``Cost``.
    """
    arrays = dictionary_bytes(used, plan.configs[TrainConfig].state_dtype) if used else 0
    held = DeviceBytes(weight_bytes(plan.model, plan.axes, plan.dtype), arrays, activations=activations)
    return Cost(held, flops, plan.dtype, **dict(overhead=_OVERHEAD, host_seconds=START) | more)


def clean_bytes(plan: PlannedRun, used: DictionaryConfig) -> int:
    """A run of the head without an edit, and the features of its prompts."""
    length = prompt_length(plan)
    return layer_bytes(plan, PROMPTS, length, plan.dtype) + feature_bytes(used.n_features, PROMPTS, length)


def edited_bytes(plan: PlannedRun, used: DictionaryConfig, gathered: int, rows: int) -> int:
    """Prompts without an edit, with their keys, values and gathered features; the head, or a batch of edited rows."""
    model, length = plan.model, prompt_length(plan)
    past = 2 * WIDTH[plan.dtype] * layers_above(plan, used) * model.n_kv_heads * model.d_head
    bank = kept_prompts(plan) * length * (4 * (gathered + 2 * used.d_in) + past)
    return bank + max(clean_bytes(plan, used), layer_bytes(plan, rows, length, plan.dtype, kept=4))
