"""The stage ``probe``: linear probes of a dictionary's features, and of the raw activations at its site.

Labels (``saejax.tasks.labels``) are read off prompts of behaviours and, with ``--probe.benchmarks``, off the questions
of benchmarks. The features that a sparse probe selects are then ablated one by one on the behaviour's test prompts,
beside features matched in firing rate: what a probe reads, the model need not use.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from saejax.errors import UserError
from saejax.files import read_lines, whole_file
from saejax.interventions import activity
from saejax.interventions.answers import VerdictConfig
from saejax.interventions.probing import (
    ProbeFit,
    ProbeTask,
    feature_effects,
    match_firing_rates,
    paired_difference,
    pool_inputs,
    run_probes,
)
from saejax.interventions.split_model import SplitModel
from saejax.results import Interval, from_json, to_json
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.settings import ProbeConfig, TaskConfig
from saejax.statistics import bootstrap
from saejax.statistics.ranks import holm
from saejax.tasks import run_inputs
from saejax.tasks.behaviours import SPLITS, Prompt, read_logit_diffs, read_prompts
from saejax.tasks.benchmark_definitions import way
from saejax.tasks.benchmark_stage import FILE
from saejax.tasks.benchmarks import read_items
from saejax.tasks.labels import LABELS, Labelled, label_prompts
from saejax.tasks.scored_items import WAYS, GeneratedItem

TABLE = "probes.parquet"
ABLATED = 10  # features of a probe that are ablated, at most
_RESAMPLES = 10_000
_CONTROLS = 2  # matched features of each ablated one
_INTERVALS = ("accuracy", "shuffled", "control", "against_dense")
_CALCULATION = re.compile(r"<<([^=>]*)=[^>]*>>")  # in solutions of GSM8K


@dataclasses.dataclass(frozen=True)
class SelectedFeature:
    """A feature that a probe selects, ablated alone on the behaviour's test prompts."""

    feature: int  #: its index
    drop: Interval  #: fall of the logit difference, 95 % bootstrap interval over prompts within templates
    p_value: float  #: two-sided, of no effect
    p_holm: float  #: corrected by Holm's method over all ablated features of the run


@dataclasses.dataclass(frozen=True)
class SelectedFeatures:
    """Whether the features that a probe selects are those whose ablation has an effect."""

    k: int  #: size of the probe that selected them
    features: tuple[SelectedFeature, ...]  #: in the order of the probe
    matched: tuple[float, ...]  #: mean fall of the logit difference for each feature matched in firing rate
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
    """What can be read off a dictionary's features, and off raw activations."""

    dictionary: str  #: its name
    site: str  #: that it reads: of a transcoder, its input
    pool: str  #: over positions: last, max or mean
    labels: tuple[ProbedLabel, ...]  #: each of all behaviours, of a behaviour or of a benchmark


def run_probe(run: Run) -> ProbeResults:
    """Probe a dictionary's features, and the raw activations, for every label.

    Args:
      run: of the unit; ``probes.parquet``, a row for each probe, is written into its folder.

    Returns:
      The results of the unit.

    Raises:
      UserError: there are no prompts of a split, the dictionary belongs to another model, or an activation is not
        finite.
    """
    config = run.configs[ProbeConfig]
    if not config.strengths:
        raise UserError("--probe.strengths is empty: name at least one inverse strength, such as 0.01")
    behaviours = _behaviour_prompts(run) if "baseline" in run.inputs else ([], [])
    benchmarks = [read_benchmark_prompts(run, unit) for unit in run.inputs if unit.startswith("benchmark/")]
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
    dictionary = run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        split = SplitModel(run_inputs.load_run_model(run), dictionary)
        pooled = functools.cache(lambda prompts: pool_inputs(split, prompts, config.pool))

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            return _probe_label(config, split, wanted[name], *pooled(wanted[name].prompts), on_progress)

        return measure

    measured = parts.each_part(run, list(wanted), begin, ProbedLabel)
    results = correct(tuple(measured.values()))
    with whole_file(run.folder / TABLE) as beside:
        pq.write_table(make_table(results), beside)
    return ProbeResults(config.dictionary, dictionary.site, config.pool, results)


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
            operators = re.findall(r"[-+*/]", calculations[-1].lstrip("-"))
            labels |= {"operation": operators[-1]} if operators else {}
        split = "train" if train else "test"
        prompts.append(Prompt(name, split, item.prompt, item.reference, "", labels=tuple(labels.items())))
    if not prompts:
        raise UserError(f"{path} has no items: run the stage benchmark again")
    return prompts, [1.0 if dict(prompt.labels).get("correct") == "right" else -1.0 for prompt in prompts]


def _probe_label(
    config: ProbeConfig,
    split: SplitModel,
    labelled: Labelled,
    inputs: Mapping[str, np.ndarray],
    is_read_N: np.ndarray,
    on_progress: parts.OnProgress,
) -> parts.Measured:
    fits, rights = [], []
    with threadpool_limits(1):  # threads of products this small only wait for each other
        for name, x_PxC in inputs.items() if not labelled.reason else ():
            train_NxC, test_MxC = x_PxC[labelled.train_N], x_PxC[labelled.test_M]
            task = ProbeTask(train_NxC, labelled.train_class_N, test_MxC, labelled.test_class_M)
            for fit, right_M in run_probes(task, config, [*f"{labelled.name} {name}".encode()], name):
                fits.append(fit)
                rights.append(right_M)
                on_progress(0, 0)
    # The last one is the dense probe, of all raw activations.
    gaps = [paired_difference(right_M, rights[-1], config.seed) for right_M in rights[:-1]]
    fits = [
        dataclasses.replace(fit, against_dense=gap) for fit, gap in zip(fits, [*gaps, None][: len(fits)], strict=True)
    ]
    used_P = np.concatenate([labelled.train_N, labelled.test_M])
    results = ProbedLabel(
        label=labelled.label,
        behaviour=labelled.behaviour,
        reason=labelled.reason or None,
        classes={name: dict(zip(SPLITS, counts, strict=True)) for name, counts in labelled.classes.items()},
        left_out=dict(labelled.left_out),
        unlabelled=labelled.unlabelled,
        congruent=labelled.congruent,
        unread=int((~is_read_N[used_P]).sum()),
        probes=tuple(fits),
        selected=_ablate_selected(config, split, labelled, fits, on_progress),
    )
    return parts.Measured(results, _line(labelled, fits))


def _ablate_selected(
    config: ProbeConfig,
    split: SplitModel,
    labelled: Labelled,
    fits: Sequence[ProbeFit],
    on_progress: parts.OnProgress,
) -> SelectedFeatures | None:
    """Ablate the features of the largest sparse probe that sees at most ``ABLATED``, and matched ones."""
    sparse = [fit for fit in fits if fit.input == "features" and fit.k and fit.k <= ABLATED and fit.inputs]
    tests = [p for p in labelled.prompts if p.split == "test" and p.wrong and labelled.behaviour == p.behaviour]
    if not sparse or len(tests) < 2:
        return None
    features = list(sparse[-1].inputs or ())
    active_F = activity.firing_prompts(split, split.run(tests))
    rng, matched = np.random.default_rng(config.seed), list[int]()
    for _ in range(_CONTROLS):
        free_F = np.where(np.isin(np.arange(len(active_F)), matched), np.iinfo(np.int64).max // 2, active_F)
        matched += [int(f) for f in match_firing_rates(free_F, features, rng) if f not in matched]
    drop_SxP = feature_effects(split, tests, [*features, *matched], on_progress=on_progress)
    weight_RxP = bootstrap.resampling_weights([prompt.template for prompt in tests], _RESAMPLES, config.seed)
    selected = []
    for feature, drop_P in zip(features, drop_SxP, strict=False):
        sample_R = weight_RxP @ drop_P
        p_value = bootstrap.two_sided_p(sample_R)
        interval = Interval(float(drop_P.mean()), *bootstrap.percentile_interval(sample_R))
        selected.append(SelectedFeature(feature, interval, p_value, p_value))
    matched_drops = tuple(drop_SxP[len(features) :].mean(axis=1).tolist())
    return SelectedFeatures(len(features), tuple(selected), matched_drops, "")


def correct(labels: Sequence[ProbedLabel]) -> tuple[ProbedLabel, ...]:
    """Correct p-values by Holm's method: of probes over the labels, of ablated features over all of them."""
    places = [(n, m) for n, label in enumerate(labels) for m in range(len(label.probes))]
    groups: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    for n, m in places:
        probe = labels[n].probes[m]
        groups.setdefault((probe.input, probe.k), []).append((n, m))
    p_holm: dict[tuple[int, int], float] = {}
    for group in groups.values():
        p_holm |= zip(group, holm(np.array([labels[n].probes[m].p_value for n, m in group])).tolist(), strict=True)
    ablated = [(n, m) for n, label in enumerate(labels) if label.selected for m in range(len(label.selected.features))]
    p_N = np.array([_selected(labels[n]).features[m].p_value for n, m in ablated], np.float64)
    p_ablated = dict(zip(ablated, holm(p_N).tolist(), strict=True))
    corrected = []
    for n, label in enumerate(labels):
        probes = tuple(dataclasses.replace(fit, p_holm=p_holm[n, m]) for m, fit in enumerate(label.probes))
        selected = label.selected
        if selected:
            features = tuple(
                dataclasses.replace(each, p_holm=p_ablated[n, m]) for m, each in enumerate(selected.features)
            )
            selected = dataclasses.replace(selected, features=features)
            selected = dataclasses.replace(selected, sentence=describe_selected(selected))
        corrected.append(dataclasses.replace(label, probes=probes, selected=selected))
    return tuple(corrected)


def describe_selected(selected: SelectedFeatures) -> str:
    """Return in words whether the features that a probe selects have an effect when they are ablated."""
    level, count = VerdictConfig().level, len(selected.features)
    effective = [each for each in selected.features if each.p_holm <= level]
    lowering = [each for each in effective if each.drop.low > 0]
    text = (
        f"Of {count} feature{'' if count == 1 else 's'} that the probe selects, {len(effective)} "
        f"change{'s' if len(effective) == 1 else ''} the logit difference significantly when ablated alone, "
        f"{len(lowering)} of them lowering it"
    )
    if not selected.matched:
        return f"{text}; compared with features of equal firing rate: not tested, there are none."
    largest = max(selected.features, key=lambda each: each.drop.mean)
    above = sum(drop >= largest.drop.mean for drop in selected.matched)
    return (
        f"{text}; the largest drop is {largest.drop.mean:.2f} logits (feature {largest.feature}), and {above} of "
        f"{len(selected.matched)} features of similar firing rate have a larger one."
    )


def _selected(label: ProbedLabel) -> SelectedFeatures:
    assert label.selected is not None
    return label.selected


def _line(labelled: Labelled, fits: Sequence[ProbeFit]) -> str:
    if labelled.reason:
        return f"no probe: {labelled.reason}"
    shares = {fit.input: fit.accuracy * 100 for fit in fits if fit.k is None}
    dense = [f"{name} {each.mean:.0f} % [{each.low:.0f}, {each.high:.0f}]" for name, each in shares.items()]
    majority = f"largest class {100 * fits[0].majority:.0f} %"
    return f"probe accuracy on {len(labelled.test_M)} test prompts from all inputs: {', '.join(dense)}; {majority}"


def make_table(results: Sequence[ProbedLabel]) -> pa.Table:
    """Return a row for each probe, and one for each label without; intervals are three columns, ends _low and _high."""
    text, number = pa.string(), pa.float64()
    columns = dict(label=text, behaviour=text, reason=text, input=text, k=pa.int64(), inputs=pa.list_(pa.int64()))
    columns |= {f"{name}{end}": number for name in _INTERVALS for end in ("", "_low", "_high")}
    scores = ("balanced_accuracy", "f1", "auc", "majority", "control_p", "p_value", "p_holm", "strength")
    columns |= dict.fromkeys(scores, number)
    rows = []
    for result in results:
        for probe in result.probes or (None,):
            row: dict[str, Any] = dict(label=result.label, behaviour=result.behaviour, reason=result.reason)
            row |= to_json(probe) if probe else {}
            for name in _INTERVALS:
                spread = row.get(name) or {}
                row |= {f"{name}_low": spread.get("low"), f"{name}_high": spread.get("high"), name: spread.get("mean")}
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))
