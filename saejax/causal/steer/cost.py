"""What the stage ``steer`` takes."""

from saejax.causal.cost import causal_cost, clean_bytes, kept_prompts, layers_above, prompt_length
from saejax.causal.steer.draws import CURVE_DRAWS
from saejax.causal.steer.fluency import NEW_TOKENS
from saejax.causal.steer.methods import FACTORS
from saejax.causal.steer.prompting import SHOTS
from saejax.costs.cost import WIDTH, Cost, PlannedRun
from saejax.costs.passes import layer_bytes, pass_flops
from saejax.interventions import text
from saejax.settings import SteerConfig, TaskConfig
from saejax.tasks.cost import PROMPT, count_all_behaviours


def steer_cost(plan: PlannedRun, name: str) -> Cost:
    """Prompts at every strength of four methods, draws, examples in front, text and continuations."""
    task, steer, used = plan.configs[TaskConfig], plan.configs[SteerConfig], plan.dictionary("steer")
    behaviours, strengths = count_all_behaviours(task), 3 * len(steer.doses) + len(FACTORS)
    drawn = min(steer.draw_prompts or task.test_prompts, task.test_prompts)
    draws = 4 * steer.draws + len(steer.doses) * min(CURVE_DRAWS, steer.draws)
    rows = behaviours * ((task.test_prompts + task.train_prompts) * strengths + drawn * draws)
    above, layers = layers_above(plan, used), plan.model.n_layers
    slopes = 3 * 2 * behaviours * task.train_prompts  # forwards, and backwards at twice the cost
    flops = pass_flops(plan.model, (rows + slopes) * PROMPT, PROMPT, above)
    whole = behaviours * (2 * task.test_prompts * (SHOTS + 1) * PROMPT + 5 * drawn * (PROMPT + NEW_TOKENS))
    flops += pass_flops(plan.model, whole, PROMPT, layers)
    documents = behaviours * steer.text_documents * (strengths + 1) * text.LENGTH
    flops += pass_flops(plan.model, documents, text.LENGTH, above)
    held = kept_prompts(plan) * prompt_length(plan) * 3 * WIDTH[plan.dtype] * used.d_in
    held += max(clean_bytes(plan, used), layer_bytes(plan, steer.batch_rows, prompt_length(plan), plan.dtype, kept=4))
    return causal_cost(plan, flops, held, used, counts=dict(rows=rows, tokens=rows * PROMPT))
