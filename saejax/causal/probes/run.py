"""The stage ``probe``: what a linear probe reads off a dictionary's features, and off the activations they are made of.

Every label that was asked for (``tasks.labels``) is read off the features and off the raw activations at the
dictionary's site, by probes of a few inputs and of all (``linear``). What a probe can read, the model need not use:
that is what ``ablate`` tests.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from saejax.causal.probes.inputs import pooled_inputs
from saejax.causal.probes.linear import Task, run_probes
from saejax.causal.probes.results import ProbedLabel, ProbeFit, ProbeResults
from saejax.causal.probes.scores import paired_difference
from saejax.errors import UserError
from saejax.files import whole_file
from saejax.interventions.split_model import SplitModel
from saejax.results import to_json
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.settings import ProbeConfig
from saejax.tasks import run_inputs
from saejax.tasks.behaviours import SPLITS, read_logit_diffs, read_prompts
from saejax.tasks.labels import Labelled, label_prompts

TABLE = "probes.parquet"
_INTERVALS = ("accuracy", "auc", "shuffled", "auc_shuffled", "random", "against_dense")


def run_probe(run: Run) -> ProbeResults:
    """Probes a dictionary's features, and the raw activations, for every label.

    A label, of all prompts or of a behaviour, is a part in the sense of ``stages``; ``probes.parquet`` has all of them
    as one table.

    Raises:
      UserError: there are no prompts of a split, the dictionary belongs to another model, or something is not finite.
      Interrupted: asked to stop; labels that were finished are kept.
    """
    config = run.configs[ProbeConfig]
    if not config.strengths:
        raise UserError("--probe.strengths is empty: name at least one inverse strength, such as 0.01")
    path = run.inputs["baseline"] / "prompts.jsonl"
    kept, every = run_inputs.read_behaviours(run), zip(read_prompts(path), read_logit_diffs(path), strict=True)
    rows = [(prompt, diff) for prompt, diff in every if prompt.behaviour in kept]
    prompts, logit_diffs = [prompt for prompt, _ in rows], [diff for _, diff in rows]
    for split in SPLITS:
        if not any(prompt.split == split for prompt in prompts):
            raise UserError(f"{path} has no {split} prompts: run the stage baseline again")
    asked = {
        some.name: some for label in dict.fromkeys(config.labels) for some in label_prompts(label, prompts, logit_diffs)
    }
    dictionary = run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        split = SplitModel(run_inputs.load_run_model(run), dictionary)
        pooled = functools.cache(lambda some: pooled_inputs(split, some, config.pool))

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            with threadpool_limits(1):  # threads of products this small only wait for each other
                return _probe_label(config, asked[name], *pooled(asked[name].prompts), on_progress)

        return measure

    results = tuple(parts.each_part(run, list(asked), begin, ProbedLabel).values())
    with whole_file(run.folder / TABLE) as beside:
        pq.write_table(table(results), beside)
    return ProbeResults(config.dictionary, dictionary.site, config.pool, results)


def _probe_label(
    config: ProbeConfig,
    labelled: Labelled,
    inputs: Mapping[str, np.ndarray],
    read_N: np.ndarray,
    on_progress: parts.OnProgress,
) -> parts.Measured:
    fits, rights = [], []
    for name, x_PxC in inputs.items() if not labelled.reason else ():
        train_NxC, test_MxC = x_PxC[labelled.train_N], x_PxC[labelled.test_M]
        task = Task(train_NxC, labelled.train_class_N, test_MxC, labelled.test_class_M, config.ranking)
        for fit, right_M in run_probes(task, config, [*f"{labelled.name} {name}".encode()], name):
            fits.append(fit)
            rights.append(right_M)
            on_progress(0, 0)
    # The last one is the dense probe, of all raw activations.
    beside = [paired_difference(right_M, rights[-1], config.seed) for right_M in rights[:-1]]
    rows = [
        dataclasses.replace(fit, against_dense=gap) for fit, gap in zip(fits, [*beside, None][: len(fits)], strict=True)
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
        unread=int((~read_N[used_P]).sum()),
        probes=tuple(rows),
    )
    return parts.Measured(results, _line(labelled, rows))


def _line(labelled: Labelled, rows: Sequence[ProbeFit]) -> str:
    if labelled.reason:
        return f"no probe: {labelled.reason}"
    shares = {row.input: row.accuracy * 100 for row in rows if row.k is None}
    full = [f"{name} {one.mean:.0f} % [{one.low:.0f}, {one.high:.0f}]" for name, one in shares.items()]
    majority = f"largest class {100 * rows[0].majority:.0f} %"
    return f"accuracy on {len(labelled.test_M)} test prompts from all inputs: {', '.join(full)}; {majority}"


def table(results: Sequence[ProbedLabel]) -> pa.Table:
    """A row for each probe, and one for each label that has none; intervals in three columns, ends ``_low``, ``_high``.

    Args:
      results: as in the stage's ``labels``.
    """
    text, number = pa.string(), pa.float64()
    columns = dict(label=text, behaviour=text, reason=text, input=text, k=pa.int64(), inputs=pa.list_(pa.int64()))
    columns |= {f"{name}{end}": number for name in _INTERVALS for end in ("", "_low", "_high")}
    columns |= dict.fromkeys(("balanced_accuracy", "majority", "p_value", "strength"), number)
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
