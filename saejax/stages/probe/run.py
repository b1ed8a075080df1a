"""The stage ``probe``: linear probes of features and raw activations, for every label of the prompts.

A label of a behaviour, of all behaviours or of a benchmark is a part in the sense of ``saejax.runner.parts``.
"""

import functools
import re

import numpy as np

from saejax.errors import UserError
from saejax.files import read_lines
from saejax.interventions.benchmark import BenchmarkItems
from saejax.interventions.probing import (
    LOG_LIKELIHOOD,
    FeatureAblation,
    ProbedLabel,
    ProbeResults,
    ablation_of,
    correct,
    label_all,
    probe_inputs,
    probe_label,
)
from saejax.interventions.references import References
from saejax.interventions.settings import ProbeConfig
from saejax.interventions.split_model import GROUP_TOKENS, SplitModel
from saejax.progress import OnProgress
from saejax.results import from_json
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.stages import inputs as run_inputs
from saejax.stages.benchmark.run import FILE
from saejax.tasks.behaviours import SPLITS, Prompt, read_logit_diffs, read_prompts
from saejax.tasks.benchmark_definitions import way
from saejax.tasks.benchmarks import read_items
from saejax.tasks.gate import read_tested
from saejax.tasks.scored_items import WAYS, GeneratedItem
from saejax.tasks.settings import TaskConfig

BENCHMARK_ITEMS = 40  # test items of a benchmark on which they are ablated, at most
_CALCULATION = re.compile(r"<<([^=>]*)=[^>]*>>")  # in solutions of GSM8K


def run_probe(run: Run) -> ProbeResults:
    """Probe a dictionary's features, and the raw activations, for every label.

    Args:
      run: of the unit.

    Returns:
      The results of the unit.

    Raises:
      UserError: there are no prompts of a split, the dictionary belongs to another model, or an activation is not
        finite.
    """
    config = run.configs[ProbeConfig]
    benchmarks = {unit.partition("/")[2]: unit for unit in run.inputs if unit.startswith("benchmark/")}
    groups = [read_benchmark_prompts(run, unit) for unit in benchmarks.values()]
    wanted = label_all(config, _behaviour_prompts(run) if "baseline" in run.inputs else ([], []), groups)
    dictionary = run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        lm = run_inputs.load_run_model(run, dictionary.config)
        split = SplitModel(lm, dictionary)
        # Labels of the same prompts share their inputs, whose computation takes most of the time.
        inputs_of = functools.cache(lambda prompts: probe_inputs(split, prompts))

        def ablation(name: str) -> FeatureAblation | None:
            labelled = wanted[name]
            if labelled.behaviour not in benchmarks:
                return ablation_of(split, labelled)
            task = run.configs[TaskConfig]
            ids = [prompt.items[0] for prompt in labelled.prompts if prompt.split == "test"][:BENCHMARK_ITEMS]
            items = {item.id: item for item in read_items(labelled.behaviour, task)}
            chosen = [items[item_id] for item_id in ids]
            references = BenchmarkItems(lm, labelled.behaviour, task, (), chosen).references(chosen)
            answers = References(split, references, GROUP_TOKENS)
            return FeatureAblation(LOG_LIKELIHOOD, answers, [""] * len(references))

        def measure(name: str, on_progress: OnProgress) -> parts.Measured:
            inputs = inputs_of(wanted[name].prompts)
            results = probe_label(config, wanted[name], *inputs, lambda: ablation(name), lambda: on_progress(0, 0))
            return parts.Measured(results, _line(results))

        return measure

    tested = read_tested(run.inputs["baseline"]) if "baseline" in run.inputs else None
    mark = (lambda name: tested.mark(wanted[name].behaviour)) if tested else (lambda name: "")
    measured = parts.each_part(run, list(wanted), begin, ProbedLabel, mark=mark)
    return ProbeResults(config.dictionary, dictionary.site, correct(tuple(measured.values())))


def _behaviour_prompts(run: Run) -> tuple[list[Prompt], list[float]]:
    """Return the prompts of the tested behaviours, and their logit differences."""
    path = run.inputs["baseline"] / "prompts.jsonl"
    tested = run_inputs.read_behaviours(run)
    rows = [row for row in zip(read_prompts(path), read_logit_diffs(path), strict=True) if row[0].behaviour in tested]
    for split in SPLITS:
        if not any(prompt.split == split for prompt, _ in rows):
            raise UserError(f"{path} has no {split} prompts: run the stage baseline again")
    return [prompt for prompt, _ in rows], [diff for _, diff in rows]


def read_benchmark_prompts(run: Run, unit: str) -> tuple[list[Prompt], list[float]]:
    """Return a benchmark's questions as prompts with labels, half of them train prompts, drawn by seed.

    The labels are ``correct`` (right or wrong; the flexible rule judges generated answers), ``steps`` (calculations of
    the reference solution), ``operation`` (the operator of its last one) and ``task``, each where the benchmark has it.

    Args:
      run: of the stage.
      unit: unit of the benchmark, such as ``benchmark/gsm8k``.
    """
    name, task = unit.partition("/")[2], run.configs[TaskConfig]
    path = run.inputs[unit] / FILE
    scored = [from_json(WAYS[way(name, task)], row, path) for row in read_lines(path)]
    solutions = {item.id: item.solution for item in read_items(name, task)}
    # Benchmarks have no splits of their own; halves are drawn.
    is_train = np.random.default_rng(run.configs[ProbeConfig].seed).permutation(len(scored)) % 2 == 0
    prompts = []
    for item, train in zip(scored, is_train, strict=True):
        right = item.flexible.correct if isinstance(item, GeneratedItem) else item.judged[1]
        labels = {"task": item.task} if item.task else {}
        if right is not None:
            labels["correct"] = "right" if right else "wrong"
        calculations = _CALCULATION.findall(solutions.get(item.id, ""))
        if calculations:
            labels["steps"] = str(len(calculations))
            # A leading minus is a sign.
            operators = re.findall(r"[-+*/]", calculations[-1].lstrip("-"))
            labels |= {"operation": operators[-1]} if operators else {}
        split = "train" if train else "test"
        prompt = Prompt(name, split, item.prompt, item.reference, "", items=(item.id,), labels=tuple(labels.items()))
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} has no items: run the stage benchmark again")
    return prompts, [1.0 if dict(prompt.labels).get("correct") == "right" else -1.0 for prompt in prompts]


def _line(result: ProbedLabel) -> str:
    if result.reason:
        return f"no probe: {result.reason}"
    shares = {fit.input: fit.accuracy * 100 for fit in result.probes if fit.k is None}
    dense = [f"{name} {share.mean:.0f} % [{share.low:.0f}, {share.high:.0f}]" for name, share in shares.items()]
    tests = sum(counts["test"] for counts in result.classes.values())
    majority = f"largest class {100 * result.probes[0].majority:.0f} %"
    return f"probe accuracy on {tests} test prompts from all inputs: {', '.join(dense)}; {majority}"
