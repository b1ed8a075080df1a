"""What the stage ``patch`` takes."""

from saejax.causal.cost import FIRING, causal_cost, edited_bytes, layers_above, prompt_length
from saejax.causal.patching.features import steps
from saejax.causal.patching.pairs import GROUP_BYTES, STEP
from saejax.causal.screening import points
from saejax.costs.cost import WIDTH, Cost, Scene
from saejax.costs.passes import layer_bytes, pass_flops
from saejax.tasks.cost import PROMPT, count_all_behaviours

_CHANGED = 0.5  # of a prompt's positions: those from the first on at which its counterpart differs


def patch_cost(scene: Scene, name: str) -> Cost:
    """A kind of site, or the features of the dictionary."""
    return _sites(scene) if name in scene.configs["patch"].kinds else _features(scene)


def _sites(scene: Scene) -> Cost:
    """Every layer and position in both directions, from there on: on average half of what is left of each."""
    task, model = scene.configs["task"], scene.model
    layers, pairs = model.n_layers, count_all_behaviours(task) * task.test_prompts
    rows = round(2 * layers * _CHANGED * PROMPT * pairs)
    tokens = round(rows * _CHANGED * PROMPT / 2) + 2 * pairs * PROMPT
    flops = pass_flops(model, tokens, PROMPT, layers / 2)
    return causal_cost(scene, flops, _recorded(scene), counts=dict(rows=rows, tokens=tokens))


def _recorded(scene: Scene) -> int:
    """Two recorded runs of a group of pairs, and a batch of patched rows."""
    model, length = scene.model, prompt_length(scene)
    streams = (2 * model.n_layers + 1) * model.d_model
    token = (streams + 2 * model.n_layers * model.n_kv_heads * model.d_head) * WIDTH[scene.dtype]
    pairs = -(-scene.configs["task"].test_prompts // STEP) * STEP
    recorded = min(pairs * length * token, max(GROUP_BYTES, STEP * length * token))
    return 2 * recorded + layer_bytes(scene, scene.configs["patch"].batch_rows, length, scene.dtype, kept=4)


def _features(scene: Scene) -> Cost:
    """The top features one by one and in growing sets in both directions, and random sets in one."""
    task, patch, used = scene.configs["task"], scene.configs["patch"], scene.dictionary("patch")
    behaviours, grown = count_all_behaviours(task), len(steps(patch.top))
    sets = 2 * (patch.top + grown + 1) + patch.draws * grown
    rows = round(behaviours * task.test_prompts * sets * FIRING)
    slopes = 3 * points(patch.estimate) * behaviours * task.train_prompts  # forwards, and backwards at twice the cost
    tokens = (rows + slopes) * PROMPT
    flops = pass_flops(scene.model, tokens, PROMPT, layers_above(scene, used))
    # All features at once, those of the prompts and those of the counterparts.
    come_and_go = edited_bytes(scene, used, 2 * used.n_features, patch.batch_rows)
    return causal_cost(scene, flops, come_and_go, used, counts=dict(rows=rows, tokens=tokens))
