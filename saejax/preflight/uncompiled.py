"""Operations of stages whose programs preflight does not compile: rows or tokens, times what one of them takes."""

from collections.abc import Callable, Collection, Mapping

from saejax.costs.plan import CHARACTERS_PER_TOKEN, PlannedRun
from saejax.dictionaries import DictionaryConfig
from saejax.flops import pass_flops
from saejax.interventions.ablation import expected_rows
from saejax.interventions.benchmark import ablate_config
from saejax.interventions.patching import EACH, count_heads
from saejax.interventions.settings import PatchConfig, SteerConfig, StudyConfig
from saejax.interventions.steering import FACTORS, METHODS
from saejax.models.sites import HEAD_KINDS, Site
from saejax.stages.ablate.plan import FIRING, SHORTER, prompt_length
from saejax.stages.baseline.plan import PER_TOKEN, count_all_behaviours, count_conditions, count_judging
from saejax.stages.capture.plan import captured_tokens, recorded_rows
from saejax.stages.interpret.settings import InterpretConfig
from saejax.stages.patch.run import ablation_settings, positions_of
from saejax.stages.steer.run import MAX_PROMPTS
from saejax.tasks.behaviours import Prompt
from saejax.tasks.benchmark_definitions import definition, way
from saejax.tasks.benchmark_prompts import worked_examples
from saejax.tasks.settings import TaskConfig

_CHOICES = 4  # choices of a question, about


def count_flops(plan: PlannedRun, stages: Collection[str]) -> dict[str, float]:
    """Return the operations of those of some stages that are counted here; generated answers are not."""
    return {stage: count(plan) for stage, count in _COUNTS.items() if stage in stages}


def _benchmark(plan: PlannedRun) -> float:
    """Return the operations of benchmarks whose answers are not generated: a whole pass for each text."""
    task, flops = plan.configs[TaskConfig], 0.0
    for name in task.benchmarks:
        if (scored := way(name, task)) != "generate":
            texts, length = (task.examples or definition(name).examples), item_tokens(plan, name)
            texts *= _CHOICES if scored == "choice" else 1
            flops += pass_flops(plan.model, texts * length, length, plan.model.n_layers)
    return flops


def _study(plan: PlannedRun) -> float:
    """Return the operations of a study: rows above the site, and whole passes for every answer that is scored."""
    study, task, used, flops = plan.configs[StudyConfig], plan.configs[TaskConfig], plan.dictionary("study"), 0.0
    for name in study.benchmarks:
        length, judging = item_tokens(plan, name), count_judging(study, task, name)
        rows = expected_rows(ablate_config(study), {name: _prompts(judging, judging)}, name, used.n_features)
        texts = judging * (1 + _CHOICES * count_conditions(study) * (way(name, task) == "choice"))
        flops += _rows_flops(plan, used, FIRING * rows, length)
        flops += pass_flops(plan.model, texts * length, length, plan.model.n_layers)
    return flops


def item_tokens(plan: PlannedRun, name: str) -> int:
    """Return about how many tokens a benchmark's item has with its worked examples and answer, by these examples."""
    benchmark, task, every = definition(name), plan.configs[TaskConfig], worked_examples()
    worked = [row for part in (benchmark.parts if name not in every else (name,)) for row in every[part]]
    of_one = sum(len(benchmark.question.format(question)) + len(answer) for question, answer in worked) / len(worked)
    per_token = PER_TOKEN if benchmark.new_tokens else CHARACTERS_PER_TOKEN  # of generated answers most are numbers
    shots = benchmark.shots if task.shots < 0 else task.shots
    return min(round((shots + 1) * of_one / per_token), plan.model.context)


def _interpret(plan: PlannedRun) -> float:
    """Return the operations of encoding the text by each dictionary and its two controls."""
    tokens = min(recorded_rows(plan), captured_tokens(plan))
    stacks = [plan.stacks[kind] for kind in plan.configs[InterpretConfig].dictionaries if kind in plan.stacks]
    return sum(3 * 2.0 * tokens * len(s.members) * s.dictionary.d_in * s.dictionary.n_features for s in stacks)


def _patch(plan: PlannedRun) -> float:
    """Return the operations of patching kinds of site, and features as ``ablate`` does."""
    patch, task, length, flops = plan.configs[PatchConfig], plan.configs[TaskConfig], prompt_length(plan), 0.0
    behaviours, layers = count_all_behaviours(task), plan.model.n_layers
    for kind in patch.kinds:
        positions = SHORTER * length if positions_of(kind, patch) == EACH else 1
        places = positions * (count_heads(plan.model, kind) if kind in HEAD_KINDS else 1)
        # Both ways, and from the row's layer on: through half of the layers in the mean.
        rows = 2 * layers * places * behaviours * task.test_prompts
        flops += pass_flops(plan.model, round(SHORTER * rows * length), length, layers / 2)
    if patch.dictionary:
        prompts = {str(number): _prompts(task.train_prompts, task.test_prompts) for number in range(behaviours)}
        used = plan.dictionary("patch")
        rows = behaviours * expected_rows(ablation_settings(patch), prompts, "0", used.n_features) if behaviours else 0
        flops += _rows_flops(plan, used, SHORTER * FIRING * rows, length)
    return flops


def _steer(plan: PlannedRun) -> float:
    """Return the operations of every strength on the prompts of both splits, and of the controls."""
    steer, task = plan.configs[SteerConfig], plan.configs[TaskConfig]
    strengths, tests = max(len(steer.doses), len(FACTORS)), min(task.test_prompts, MAX_PROMPTS)
    rows = len(METHODS) * (strengths * (task.train_prompts + tests) + steer.random_sets * tests)
    rows *= count_all_behaviours(task)
    return _rows_flops(plan, plan.dictionary("steer"), SHORTER * rows, prompt_length(plan))


def _prompts(train: int, test: int) -> list[Prompt]:
    return [Prompt("", split, "", "", "") for split in ["train"] * train + ["test"] * test]


def _rows_flops(plan: PlannedRun, used: DictionaryConfig, rows: float, length: int) -> float:
    """Return the operations of rows of so many tokens through the layers above a dictionary's site."""
    below = 0 if used.widths else Site.parse(used.site).layer + 1  # a crosscoder's rows run through the whole model
    return pass_flops(plan.model, round(rows * length), length, plan.model.n_layers - below)


_COUNTS: Mapping[str, Callable[[PlannedRun], float]] = {
    "benchmark": _benchmark,
    "study": _study,
    "interpret": _interpret,
    "patch": _patch,
    "steer": _steer,
}
