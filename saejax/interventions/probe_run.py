"""The stage ``probe``: linear probes of a dictionary's features, and of the raw activations at its site.

Labels (``saejax.tasks.labels``) are predicted for prompts of behaviours and, with ``--probe.benchmarks``, for the
questions of benchmarks. The features that a sparse probe selects are then ablated one by one on test prompts, and
compared with features matched in firing rate: a label that a probe can read need not be used by the model.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from saejax.errors import UserError
from saejax.files import read_lines
from saejax.interventions.answers import VerdictConfig, mean_interval
from saejax.interventions.benchmark import BenchmarkItems
from saejax.interventions.probing import (
    UNITS,
    FeatureAblation,
    ProbeFit,
    ProbeTask,
    ablation_on_prompts,
    ablation_on_references,
    match_firing_rates,
    paired_difference,
    probe_inputs,
    run_probes,
)
from saejax.interventions.split_model import SplitModel
from saejax.results import Interval, from_json
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.settings import ProbeConfig, TaskConfig
from saejax.statistics import bootstrap
from saejax.statistics.ranks import holm_by_key
from saejax.tasks import run_inputs
from saejax.tasks.behaviours import SPLITS, Prompt, read_logit_diffs, read_prompts
from saejax.tasks.benchmark_definitions import way
from saejax.tasks.benchmark_scores import FILE
from saejax.tasks.benchmarks import read_items
from saejax.tasks.labels import LABELS, Labelled, label_prompts
from saejax.tasks.scored_items import WAYS, GeneratedItem

ABLATED = 10  # features of a probe that are ablated, at most
BENCHMARK_ITEMS = 40  # test items of a benchmark on which they are ablated, at most
_RESAMPLES = 10_000
_CONTROLS = 2  # matched features of each ablated one
_CALCULATION = re.compile(r"<<([^=>]*)=[^>]*>>")  # in solutions of GSM8K


@dataclasses.dataclass(frozen=True)
class SelectedFeature:
    """A feature that a probe selects, ablated alone on the behaviour's test prompts."""

    feature: int  #: its index
    drop: Interval  #: fall of the readout, logits or nats, 95 % bootstrap interval over prompts within templates
    p_value: float  #: two-sided, of no effect
    p_holm: float  #: corrected by Holm's method over all ablated features of the run


@dataclasses.dataclass(frozen=True)
class SelectedFeatures:
    """Effects of ablating the features that a probe selects."""

    k: int  #: size of the probe that selected them
    readout: str  #: the readout whose fall is measured: logit difference, or log-likelihood of the reference answer
    features: tuple[SelectedFeature, ...]  #: in the order of the probe
    matched: tuple[float, ...]  #: mean fall of the readout for each feature matched in firing rate
    sentence: str  #: the answer in words


@dataclasses.dataclass(frozen=True)
class ProbedLabel:
    """The probes of a label; also in `<label>.json` or `<label>-<behaviour>.json`."""

    label: str  #: its name
    behaviour: str  #: behaviour or benchmark whose prompts are read; "" for all behaviours
    reason: str | None  #: why there is no probe; None where there is
    classes: Mapping[str, Mapping[str, int]]  #: class -> its prompts by split
    left_out: Mapping[str, int]  #: prompts of classes with fewer than 5 train prompts, by class
    unlabelled: int  #: prompts without such a label
    #: of `number`: prompts whose noun beside the verb was given the subject's number, half of those of agreement; 0:
    #: that noun, if there is one, may give the number away
    congruent: int
    unread: int  #: prompts without a position that the dictionary reads: their inputs are 0
    probes: tuple[ProbeFit, ...]  #: none if there is a reason
    selected: SelectedFeatures | None  #: None where none were ablated


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """Linear probes of a dictionary's features and of raw activations."""

    dictionary: str  #: its name
    site: str  #: that it reads: of a transcoder, its input
    labels: tuple[ProbedLabel, ...]  #: each of all behaviours, of a behaviour or of a benchmark


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
        lm = run_inputs.load_run_model(run)
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
            chosen = [items[each] for each in ids]
            return ablation_on_references(
                split, BenchmarkItems(lm, labelled.behaviour, task, (), chosen).references(chosen)
            )

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            inputs = inputs_of(wanted[name].prompts)
            results = probe_label(config, wanted[name], *inputs, lambda: ablation(name), lambda: on_progress(0, 0))
            return parts.Measured(results, _line(results))

        return measure

    measured = parts.each_part(run, list(wanted), begin, ProbedLabel)
    return ProbeResults(config.dictionary, dictionary.site, correct(tuple(measured.values())))


def label_all(
    config: ProbeConfig,
    behaviours: tuple[Sequence[Prompt], Sequence[float]],
    benchmarks: Sequence[tuple[Sequence[Prompt], Sequence[float]]] = (),
) -> dict[str, Labelled]:
    """Return the labelled prompts of each label and behaviour or benchmark, by name.

    Args:
      config: settings of the stage.
      behaviours: prompts of behaviours and their logit differences.
      benchmarks: questions of each benchmark, with 1 where the model is right and -1 elsewhere.

    Raises:
      UserError: there is no strength, no such label, or no prompt that has one.
    """
    if not config.strengths:
        raise UserError("--probe.strengths is empty: name at least one inverse strength, such as 0.01")
    of_benchmarks = {name for prompts, _ in benchmarks for prompt in prompts for name, _ in prompt.labels}
    wanted: dict[str, Labelled] = {}
    for label in dict.fromkeys(config.labels):
        of_prompts = label in LABELS or any(label in dict(prompt.labels) for prompt in behaviours[0])
        # A label that benchmarks alone have is no mistake for behaviours.
        if behaviours[0] and (of_prompts or label not in of_benchmarks):
            wanted |= {each.name: each for each in label_prompts(label, *behaviours)}
        for prompts, diffs in benchmarks:
            if any(label in dict(prompt.labels) for prompt in prompts):
                wanted |= {each.name: each for each in label_prompts(label, prompts, diffs)}
    if not wanted:
        raise UserError(f"no prompt has a label of --probe.labels={','.join(config.labels)}: name one that some have")
    return wanted


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


def probe_label(
    config: ProbeConfig,
    labelled: Labelled,
    inputs: Mapping[str, np.ndarray],
    is_read_P: np.ndarray,
    ablation: Callable[[], FeatureAblation | None],
    check_stop: Callable[[], None] = lambda: None,
) -> ProbedLabel:
    """Fit the probes of a label, and ablate the features that one of them selects.

    Args:
      config: settings of the stage.
      labelled: the labelled prompts.
      inputs: from ``probe_inputs``.
      is_read_P: from ``probe_inputs``.
      ablation: returns the test prompts on which features are ablated; None where there are none.
      check_stop: called now and then; may raise to stop.
    """
    fits, rights = [], []
    with threadpool_limits(1):  # threads of products this small only wait for each other
        for name, x_PxC in inputs.items() if not labelled.reason else ():
            train_NxC, test_MxC = x_PxC[labelled.train_N], x_PxC[labelled.test_M]
            task = ProbeTask(train_NxC, labelled.train_class_N, test_MxC, labelled.test_class_M)
            for fit, right_M in run_probes(task, config, [*f"{labelled.name} {name}".encode()], name):
                fits.append(fit)
                rights.append(right_M)
                check_stop()
    # The last one is the dense probe, of all raw activations.
    for place, right_M in enumerate(rights[:-1]):
        gap = paired_difference(right_M, rights[-1], config.seed)
        fits[place] = dataclasses.replace(fits[place], against_dense=gap)
    return ProbedLabel(
        label=labelled.label,
        behaviour=labelled.behaviour,
        reason=labelled.reason or None,
        classes={name: dict(zip(SPLITS, counts, strict=True)) for name, counts in labelled.classes.items()},
        left_out=dict(labelled.left_out),
        unlabelled=labelled.unlabelled,
        congruent=labelled.congruent,
        unread=sum(int((~is_read_P[places]).sum()) for places in (labelled.train_N, labelled.test_M)),
        probes=tuple(fits),
        selected=ablate_selected(config, fits, ablation),
    )


def ablation_of(split: SplitModel, labelled: Labelled) -> FeatureAblation | None:
    """Return the ablation of features on a behaviour's test prompts; None with fewer than 2 of them."""
    tests = [p for p in labelled.prompts if p.split == "test" and p.wrong and labelled.behaviour == p.behaviour]
    return ablation_on_prompts(split, tests) if len(tests) > 1 else None


def ablate_selected(
    config: ProbeConfig, fits: Sequence[ProbeFit], ablation: Callable[[], FeatureAblation | None]
) -> SelectedFeatures | None:
    """Ablate the features of the largest sparse probe that sees at most ``ABLATED``, and matched ones."""
    sparse = [fit for fit in fits if fit.input == "features" and fit.k and fit.k <= ABLATED and fit.inputs]
    tests = ablation() if sparse else None
    if tests is None:
        return None
    features = list(sparse[-1].inputs or ())
    # Matched on the prompts of the ablation: what fires on few of them can change few.
    matched = match_firing_rates(tests.fires_F, _CONTROLS * features, np.random.default_rng(config.seed))
    drop_SxP = tests.measure_drop([*features, *matched.tolist()])
    weight_RxP = bootstrap.resampling_weights(tests.templates, _RESAMPLES, config.seed)
    selected = []
    for feature, drop_P in zip(features, drop_SxP, strict=False):
        p_value = bootstrap.two_sided_p(weight_RxP @ drop_P)
        selected.append(SelectedFeature(feature, mean_interval(drop_P, weight_RxP), p_value, p_value))
    matched_drops = tuple(drop_SxP[len(features) :].mean(axis=1).tolist())
    return SelectedFeatures(len(features), tests.readout, tuple(selected), matched_drops, "")


def correct(labels: Sequence[ProbedLabel]) -> tuple[ProbedLabel, ...]:
    """Correct p-values by Holm's method: of probes over the labels, of ablated features over all of them."""
    p_fits = {(n, fit.input, fit.k): fit.p_value for n, label in enumerate(labels) for fit in label.probes}
    for inputs in {key[1:] for key in p_fits}:
        p_fits |= holm_by_key({key: p for key, p in p_fits.items() if key[1:] == inputs})
    chosen = {n: label.selected for n, label in enumerate(labels) if label.selected}
    p_features = holm_by_key(
        {(n, each.feature): each.p_value for n, selected in chosen.items() for each in selected.features}
    )
    for n, selected in chosen.items():
        features = tuple(dataclasses.replace(each, p_holm=p_features[n, each.feature]) for each in selected.features)
        chosen[n] = dataclasses.replace(selected, features=features)
        chosen[n] = dataclasses.replace(chosen[n], sentence=describe_selected(chosen[n]))
    return tuple(
        dataclasses.replace(
            label,
            probes=tuple(dataclasses.replace(fit, p_holm=p_fits[n, fit.input, fit.k]) for fit in label.probes),
            selected=chosen.get(n),
        )
        for n, label in enumerate(labels)
    )


def describe_selected(selected: SelectedFeatures) -> str:
    """Return in words whether the features that a probe selects have an effect when they are ablated."""
    level, count = VerdictConfig().level, len(selected.features)
    effective = [each for each in selected.features if each.p_holm <= level]
    lowering = [each for each in effective if each.drop.low > 0]
    text = (
        f"Of {count} feature{'' if count == 1 else 's'} that the probe selects, {len(effective)} "
        f"change{'s' if len(effective) == 1 else ''} the {selected.readout} significantly when ablated alone, "
        f"{len(lowering)} of them lowering it"
    )
    if not selected.matched:
        return f"{text}. There are no features of similar firing rate to compare with."
    largest = max(selected.features, key=lambda each: each.drop.mean)
    above, unit = sum(drop >= largest.drop.mean for drop in selected.matched), UNITS[selected.readout]
    return (
        f"{text}. The largest drop is {largest.drop.mean:.2f} {unit} (feature {largest.feature}); {above} of "
        f"{len(selected.matched)} features of similar firing rate have one at least as large."
    )


def _line(result: ProbedLabel) -> str:
    if result.reason:
        return f"no probe: {result.reason}"
    shares = {fit.input: fit.accuracy * 100 for fit in result.probes if fit.k is None}
    dense = [f"{name} {each.mean:.0f} % [{each.low:.0f}, {each.high:.0f}]" for name, each in shares.items()]
    tests = sum(counts["test"] for counts in result.classes.values())
    majority = f"largest class {100 * result.probes[0].majority:.0f} %"
    return f"probe accuracy on {tests} test prompts from all inputs: {', '.join(dense)}; {majority}"
