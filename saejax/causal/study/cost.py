"""What the stage ``study`` takes."""

from saejax.causal.cost import causal_cost, layers_above
from saejax.causal.study.scores import conditions
from saejax.costs.cost import START, Cost, PlannedRun
from saejax.costs.passes import feature_bytes, generated_bytes, layer_bytes, pass_flops
from saejax.dictionaries import DictionaryConfig
from saejax.models.sites import Site
from saejax.settings import PreflightConfig, StudyConfig, TaskConfig
from saejax.tasks.benchmark_definitions import definition, way
from saejax.tasks.cost import OVERHEAD, generated_batch, generates, item_tokens

_FIRES = 0.6  # share of the texts on which a top or matched feature does, about: it is not removed from others


def study_cost(plan: PlannedRun, name: str) -> Cost:
    """Half of the items under every condition and without each feature, and slopes of the answers of the other half."""
    task, study, used = plan.configs[TaskConfig], plan.configs[StudyConfig], plan.dictionary("study")
    model, length = plan.model, plan.configs[PreflightConfig].benchmark_tokens
    items = min(study.items, task.examples or definition(name).examples)
    train, each = items // 2, item_tokens(name, task, length)
    likelihood = length if way(name, task) == "generate" else 0  # of the solution, beside the generated answer
    rows = (items - train) * len(conditions(study.draws))
    answers = train * (2 if way(name, task) == "choice" else 1)
    slopes = 4 * answers * length  # forwards, and backwards at twice the cost and the layers once more
    scored, below = rows * (each + likelihood), (answers + items) * length
    single = 0
    if study.single:  # the top features and those that draws put in their places
        features = study.top * (1 + min(study.draws, study.matches))
        single = int(features * _FIRES * (items - train) * (each if way(name, task) == "choice" else length))
    flops = pass_flops(model, scored, length, model.n_layers)
    flops += pass_flops(model, slopes, length, layers_above(plan, used))
    flops += pass_flops(model, single, length, layers_above(plan, used))
    flops += pass_flops(model, below, length, Site.parse(used.site).layer + 1)
    more = dict(
        overhead=OVERHEAD, host_seconds=2 * START, counts=dict(rows=rows, tokens=scored + slopes + single + below)
    )
    return causal_cost(plan, flops, _slope_bytes(plan, used), used, **more)


def _slope_bytes(plan: PlannedRun, used: DictionaryConfig) -> int:
    """A layer forwards and backwards, what enters every layer above, all features; or generated answers."""
    length = min(plan.configs[PreflightConfig].benchmark_tokens, plan.model.context)
    rows = max(1, plan.configs[StudyConfig].batch_tokens // length)
    slopes = 2 * layer_bytes(plan, rows, length, plan.dtype, kept=layers_above(plan, used))
    slopes += feature_bytes(used.n_features, rows, length)
    return max(slopes, generated_bytes(plan, *generated_batch(plan)) if generates(plan) else 0)
