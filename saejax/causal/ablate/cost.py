"""What the stage ``ablate`` takes."""

from jax.sharding import Mesh

from saejax.causal.ablate import dose, nested, text, verdict
from saejax.causal.circuits import measure as circuits
from saejax.causal.circuits import sizes
from saejax.causal.cost import FIRING, causal_cost, edited_bytes, layers_above
from saejax.causal.programs import SplitShapes
from saejax.costs.cost import START, Cost, PlannedRun
from saejax.costs.passes import pass_flops
from saejax.costs.programs import Program
from saejax.interventions.engine import FEATURES
from saejax.interventions.rows import filled_features
from saejax.interventions.slopes import points
from saejax.interventions.split_model import PROMPTS
from saejax.settings import ESTIMATES, AblateConfig, TaskConfig
from saejax.tasks.cost import PROMPT, count_all_behaviours

_COMPILE = 5.0  # seconds in which a behaviour's programs are compiled, whose prompts have a length of their own


def ablate_cost(plan: PlannedRun, name: str) -> Cost:
    """The tail on every test prompt without each of the sets, and its gradient on every train prompt."""
    task, ablate, used = plan.configs[TaskConfig], plan.configs[AblateConfig], plan.dictionary("ablate")
    behaviours, prompts = count_all_behaviours(task), (task.train_prompts, task.test_prompts)
    rows = FIRING * expected_rows(ablate, *prompts, behaviours, used.n_features)
    slopes = points(ablate.estimate) * task.train_prompts * (1 + len(ablate.baselines) + len(ablate.repeats))
    if ablate.effects == "all":
        slopes += sum(map(points, ESTIMATES)) * task.test_prompts
    tokens = int(behaviours * (rows + 3 * slopes)) * PROMPT
    if ablate.text_documents:  # the head of the vocabulary is as much again
        doses = dose.SIZES * (1 + len(ablate.baselines)) * min(text.FOR_DOSE, ablate.text_documents)
        tokens += 2 * behaviours * (doses + ablate.text_documents) * text.LENGTH
    flops = pass_flops(plan.model, tokens, PROMPT, layers_above(plan, used))
    more = dict(
        host_seconds=START + _COMPILE * behaviours * (1 + len(ablate.baselines) / 2 + len(ablate.repeats)),
        batches=dict(prompts=PROMPTS, rows=ablate.batch_rows),
    )
    return causal_cost(plan, flops, edited_bytes(plan, used, _gathered(plan), ablate.batch_rows), used, **more)


def expected_rows(ablate: AblateConfig, train: int, test: int, behaviours: int, features: int) -> float:
    """How many rows, each a set that is removed from a prompt, a behaviour has; those that change nothing included.

    Args:
      ablate: the stage's settings.
      train, test: prompts of the behaviour.
      behaviours: of the run.
      features: of the dictionary. Where every one that fires is removed by itself, that is about a quarter.
    """
    drawn: float = ablate.draws + min(ablate.draws, verdict.CONTROLS)
    if ablate.curve:
        drawn += min(ablate.top, nested.SIZES) + nested.DRAWS * min(ablate.top, nested.CONTROL_SIZES)
    # Features one by one, each with three of its like; all together, and those of the other behaviours.
    sets: float = 4 * ablate.top + behaviours
    sets += dose.SIZES * (1 + len(ablate.baselines)) + 2 * ablate.greedy
    if ablate.circuit_tests:
        sets += 3 * circuits.DRAWS + ablate.top + 3 * len(sizes.SHARES)
        drawn += len(sizes.SHARES) * sizes.DRAWS
    if ablate.effects == "all":
        sets += features * (1 + len(ablate.compare)) / 4
    if ablate.repeats:
        drawn += len(ablate.repeats) * (ablate.draws + min(ablate.draws, verdict.CONTROLS))
        sets += len(ablate.repeats) * (4 * ablate.top + 1)
    # Greedy sets: N steps over what is left of the candidates.
    grown = ablate.greedy * ((nested.CANDIDATES - 0.5) * ablate.greedy + 0.5)
    return drawn * min(ablate.draw_prompts or test, test) + sets * test + grown * train


def _gathered(plan: PlannedRun) -> int:
    """The features whose activations are kept at once, filled up; a circuit kept alone is all others removed."""
    ablate, features = plan.configs[AblateConfig], plan.dictionary("ablate").n_features
    most = ablate.top * (1 + ablate.matches)
    if ablate.circuit_tests or ablate.effects == "all":
        most = max(most, features if ablate.circuit_tests else FEATURES)
    return filled_features(min(features, most))


def ablate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The head, the slopes, the features that are removed, and the tail without them."""
    if not plan.configs[TaskConfig].has_behaviours:
        return []
    shapes, ablate, gathered = SplitShapes(plan, mesh, "ablate"), plan.configs[AblateConfig], _gathered(plan)
    return [
        shapes.head(error=ablate.error),
        shapes.slopes(ablate.estimate, ablate.replacement),
        shapes.features(ablate.replacement, gathered),
        shapes.tail(gathered, ablate.batch_rows),
    ]
