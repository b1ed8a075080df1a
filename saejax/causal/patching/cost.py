"""What the stage ``patch`` takes."""

from saejax.causal.cost import FIRING, causal_cost, edited_bytes, layers_above, prompt_length
from saejax.causal.patching.features import steps
from saejax.causal.patching.nodes import ESTIMATES, RANDOM
from saejax.causal.patching.pairs import GROUP_BYTES, STEP
from saejax.costs.cost import WIDTH, Cost, PlannedRun
from saejax.costs.passes import layer_bytes, pass_flops
from saejax.interventions.slopes import points
from saejax.settings import HEADS, PatchConfig, TaskConfig
from saejax.tasks.cost import PROMPT, count_all_behaviours

_PAIRS = 16  # a step of DAS
_CHANGED = 0.5  # of a prompt's positions: those from the first on at which its counterpart differs


def patch_cost(plan: PlannedRun, name: str) -> Cost:
    """A kind of site, heads, or the features of the dictionary."""
    if name == HEADS:
        return _heads(plan)
    return _sites(plan) if name in plan.configs[PatchConfig].kinds else _features(plan)


def _sites(plan: PlannedRun) -> Cost:
    """Every layer and position in both directions, from there on: on average half of what is left of each."""
    task, model = plan.configs[TaskConfig], plan.model
    layers = model.n_layers
    choosing = min(task.train_prompts, task.test_prompts)  # of the strongest place
    pairs = count_all_behaviours(task) * (task.test_prompts + choosing)
    rows = round(2 * layers * _CHANGED * PROMPT * pairs)
    tokens = round(rows * _CHANGED * PROMPT / 2) + 2 * pairs * PROMPT
    flops = pass_flops(model, tokens, PROMPT, layers / 2)
    return causal_cost(plan, flops, _recorded(plan), counts=dict(rows=rows, tokens=tokens))


def _heads(plan: PlannedRun) -> Cost:
    """A gradient for each layer of as many train pairs as there are test pairs, and whole runs of patched rows."""
    task, model, behaviours = plan.configs[TaskConfig], plan.model, count_all_behaviours(plan.configs[TaskConfig])
    train = behaviours * min(task.train_prompts, task.test_prompts)
    gradients = 3 * (1 + model.n_layers) * train  # a backward at twice the cost of a forward
    rows = behaviours * task.test_prompts * (len(ESTIMATES) * plan.configs[PatchConfig].top + RANDOM)
    if plan.configs[PatchConfig].paths:  # two runs of a row, of half of the layers' heads and MLPs
        senders = model.n_layers * (model.n_heads + 1) * (1 + plan.configs[PatchConfig].paths / 2)
        rows += round(2 * behaviours * task.test_prompts * senders)
    tokens = (gradients + rows) * PROMPT
    heads = 2 * model.n_layers * (model.n_heads + model.n_kv_heads) * model.d_head * WIDTH[plan.dtype]
    kept = 3 * STEP * prompt_length(plan) * heads  # of prompts, of counterparts, and gradients
    flops = pass_flops(model, tokens, PROMPT, model.n_layers)
    batch = layer_bytes(
        plan, plan.configs[PatchConfig].batch_rows, prompt_length(plan), plan.dtype, kept=model.n_layers
    )
    return causal_cost(plan, flops, kept + batch, counts=dict(rows=rows, tokens=tokens))


def _recorded(plan: PlannedRun) -> int:
    """Two recorded runs of a group of pairs, and a batch of patched rows."""
    model, length = plan.model, prompt_length(plan)
    streams = (2 * model.n_layers + 1) * model.d_model
    token = (streams + 2 * model.n_layers * model.n_kv_heads * model.d_head) * WIDTH[plan.dtype]
    pairs = -(-plan.configs[TaskConfig].test_prompts // STEP) * STEP
    recorded = min(pairs * length * token, max(GROUP_BYTES, STEP * length * token))
    return 2 * recorded + layer_bytes(plan, plan.configs[PatchConfig].batch_rows, length, plan.dtype, kept=4)


def _features(plan: PlannedRun) -> Cost:
    """The top features one by one and in growing sets in both directions, and random sets in one."""
    task, patch, used = plan.configs[TaskConfig], plan.configs[PatchConfig], plan.dictionary("patch")
    behaviours, grown = count_all_behaviours(task), len(steps(patch.top))
    sets = 2 * (patch.top + grown + 1) + patch.draws * grown
    rows = round(behaviours * task.test_prompts * sets * FIRING)
    slopes = 3 * points(patch.estimate) * behaviours * task.train_prompts  # forwards, and backwards at twice the cost
    if patch.das:  # sets and subspaces on all behaviours' pairs, for each behaviour
        learned = 3 * _PAIRS * patch.das_steps
        rows += round(behaviours * (learned + behaviours * task.test_prompts * (patch.draws + 4)))
    tokens = (rows + slopes) * PROMPT
    flops = pass_flops(plan.model, tokens, PROMPT, layers_above(plan, used))
    # All features at once, those of the prompts and those of the counterparts.
    come_and_go = edited_bytes(plan, used, 2 * used.n_features, patch.batch_rows)
    return causal_cost(plan, flops, come_and_go, used, counts=dict(rows=rows, tokens=tokens))
