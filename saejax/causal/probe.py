"""The stage ``probe``: what a linear probe reads off a dictionary's features, and off the activations they are made of.

Every label that was asked for (``tasks.labels``) is read off the features and off the raw activations at the
dictionary's site, by probes of a few inputs and of all (``probes``). What a probe can read, the model need not use:
that is what ``ablate`` tests.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from threadpoolctl import threadpool_limits

from saejax.causal.cut import Cut
from saejax.causal.probes import Task, run_probes
from saejax.causal.split import CleanRun, SplitModel, of_features
from saejax.dictionaries import stacks
from saejax.errors import Interrupted, UserError
from saejax.models.language_model import load_model
from saejax.parallel import make_mesh, sharding
from saejax.settings import ProbeConfig
from saejax.tasks.behaviours import SPLITS, Prompt, read_logit_diffs, read_prompts
from saejax.tasks.labels import Labelled, label_prompts
from saejax.workspace import Run, read_json, whole_file, write_json

TABLE = "probes.parquet"
_INTERVALS = ("accuracy", "shuffled", "random")


def run_probe(run: Run) -> dict[str, Any]:
    """Probes a dictionary's features, and the raw activations, for every label.

    A label's results are kept in ``<label>.json``, or ``<label>-<behaviour>.json``, as soon as they are there, so that
    a run that was killed goes on with the next one; ``probes.parquet`` has all of them as one table.

    Returns:
      The results; WORKSPACE.md describes them.

    Raises:
      UserError: there are no prompts of a split, the dictionary belongs to another model, or something is not finite.
      Interrupted: asked to stop; labels that were finished are kept.
    """
    config: ProbeConfig = run.configs["probe"]
    if not config.strengths:
        raise UserError("--probe.strengths is empty: name at least one inverse strength, such as 0.01")
    path = run.inputs["baseline"] / "prompts.jsonl"
    prompts, logit_diffs = read_prompts(path), read_logit_diffs(path)
    for split in SPLITS:
        if not any(prompt.split == split for prompt in prompts):
            raise UserError(f"{path} has no {split} prompts: run the stage baseline again")
    asked = [some for label in dict.fromkeys(config.labels) for some in label_prompts(label, prompts, logit_diffs)]
    files = {some.name: run.folder / f"{some.name}.json" for some in asked}
    found = {name: read_json(file) for name, file in files.items() if file.exists()}
    if found:
        run.say(f"probe: kept from an earlier run: {', '.join(found)}")
    kind, _ = stacks.kind_and_member(config.dictionary)
    dictionary = stacks.load_member(run.inputs[f"train/{kind}"], config.dictionary, "--probe.dictionary")
    if len(found) < len(asked):
        model_config = run.configs["model"]
        mesh = make_mesh(run.configs.get("mesh"))
        model = load_model(model_config.path, model_config.revision, model_config.dtype, mesh)
        inputs, read_N = pooled_inputs(SplitModel(model, dictionary), prompts, config.pool)
        for labelled in asked:
            if labelled.name not in found:
                with threadpool_limits(1):  # threads of products this small only wait for each other
                    found[labelled.name] = _probe_label(run, labelled, inputs, read_N)
                write_json(files[labelled.name], found[labelled.name])
    results = [found[some.name] for some in asked]
    with whole_file(run.folder / TABLE) as beside:
        pq.write_table(table(results), beside)
    return dict(dictionary=config.dictionary, site=dictionary.site, pool=config.pool, labels=results)


def pooled_inputs(split: SplitModel, prompts: Sequence[Prompt], pool: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the probes see of each prompt, over the positions that the dictionary reads: neither padding nor sinks.

    Args:
      split: the model.
      prompts: N of them.
      pool: "last", "max" or "mean".

    Returns:
      ``features`` [N, F] and ``raw`` activations [N, D], fp32, 0 for prompts without such a position; and which prompts
      have one, bool [N].

    Raises:
      UserError: an activation is not finite.
    """
    parts, order = [], []
    for clean in split.run(prompts):
        parts.append([np.asarray(array)[: len(clean.index_P)] for array in _pool_run(split, clean, pool)])
        order.append(clean.index_P)
    back_N = np.argsort(np.concatenate(order))
    features_NxF, raw_NxD, read_N = (np.concatenate(part)[back_N] for part in zip(*parts, strict=True))
    for feature in np.flatnonzero(~np.isfinite(features_NxF).all(axis=0))[:1]:
        raise UserError(
            f"feature {feature} has an activation that is not finite: the dictionary holds NaN or overflows; train it "
            "again"
        )
    return dict(features=features_NxF.astype(np.float32), raw=raw_NxD.astype(np.float32)), read_N


def _pool_run(split: SplitModel, clean: CleanRun, pool: str) -> tuple[jax.Array, ...]:
    return _pool(split.cut, split.graph, pool, split.state, clean.value_BxTxD, clean.domain_BxT, clean.last_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pool(
    cut: Cut,
    graph: nnx.GraphDef,
    pool: str,
    state: nnx.State,
    value_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    last_B: jax.Array,
) -> tuple[jax.Array, ...]:
    """Features [B, F], raw activations [B, D], and whether the prompt has a position that is read [B]."""
    is_last_BxT = jnp.arange(domain_BxT.shape[1])[None, :] == last_B[:, None]
    read_BxT = domain_BxT & is_last_BxT if pool == "last" else domain_BxT
    over = functools.partial(_over_positions, largest=pool == "max")
    features_BxF = of_features(graph, state, (value_BxTxD, domain_BxT, read_BxT), over)
    pooled = features_BxF, over(value_BxTxD, read_BxT), read_BxT.any(axis=1)
    return jax.lax.with_sharding_constraint(pooled, sharding(cut.mesh))


def _over_positions(x_BxTxC: jax.Array, read_BxT: jax.Array, largest: bool) -> jax.Array:
    """Maximum or mean [B, C] over the positions that are read; 0 where there are none."""
    x_BxTxC = x_BxTxC.astype(jnp.float32)
    read_BxTx1 = read_BxT[:, :, None]
    if largest:
        highest_BxC = jnp.where(read_BxTx1, x_BxTxC, -jnp.inf).max(axis=1)
        return jnp.where(read_BxTx1.any(axis=1), highest_BxC, 0.0)
    return jnp.where(read_BxTx1, x_BxTxC, 0.0).sum(axis=1) / jnp.maximum(read_BxTx1.sum(axis=1), 1)


def _probe_label(run: Run, labelled: Labelled, inputs: Mapping[str, np.ndarray], read_N: np.ndarray) -> dict[str, Any]:
    config: ProbeConfig = run.configs["probe"]
    rows = []
    for name, x_NxC in inputs.items() if not labelled.reason else ():
        train_NxC, test_MxC = x_NxC[labelled.train_N], x_NxC[labelled.test_M]
        task = Task(train_NxC, labelled.train_class_N, test_MxC, labelled.test_class_M)
        for row in run_probes(task, config, [*f"{labelled.name} {name}".encode()]):
            rows.append(dict(input=name) | row)
            if run.stopping():
                raise Interrupted(f"probe: {labelled.name}: stopped; labels that were finished are kept")
    run.say(f"probe: {labelled.name}: {_line(labelled, rows)}")
    used_N = np.concatenate([labelled.train_N, labelled.test_M])
    return dict(
        label=labelled.label,
        behaviour=labelled.behaviour,
        reason=labelled.reason or None,
        classes={name: dict(zip(SPLITS, counts, strict=True)) for name, counts in labelled.classes.items()},
        left_out=dict(labelled.left_out),
        unlabelled=labelled.unlabelled,
        unread=int((~read_N[used_N]).sum()),
        probes=rows,
    )


def _line(labelled: Labelled, rows: Sequence[Mapping[str, Any]]) -> str:
    if labelled.reason:
        return f"no probe: {labelled.reason}"
    full = [
        "{input} {0:.0f} % [{1:.0f}, {2:.0f}]".format(*(100 * value for value in row["accuracy"].values()), **row)
        for row in rows
        if row["k"] is None
    ]
    majority = f"largest class {100 * rows[0]['majority']:.0f} %"
    return f"accuracy on {len(labelled.test_M)} test prompts from all inputs: {', '.join(full)}; {majority}"


def table(results: Sequence[Mapping[str, Any]]) -> pa.Table:
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
        for probe in result["probes"] or [{}]:
            spread = {name: probe.get(name) or {} for name in _INTERVALS}
            parts = {f"{name}_{end}": value.get(end) for name, value in spread.items() for end in ("low", "high")}
            means = {name: value.get("mean") for name, value in spread.items()}
            rows.append(dict(result) | dict(probe) | parts | means)
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))
