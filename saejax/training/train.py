"""The train stage: one dictionary on one site of a captured store."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.batches import steps_per_epoch, training_batches
from saejax.activations.store import Store
from saejax.dictionaries import DictionaryConfig, save_dictionary
from saejax.dictionaries.formats import own
from saejax.errors import UserError, one_of
from saejax.parallel import describe, is_first_process, make_mesh, sharding
from saejax.settings import TrainConfig
from saejax.training.checkpoints import Checkpoints
from saejax.training.loop import Metrics, train
from saejax.training.step import Trainer
from saejax.workspace import Run

_SAMPLE = 65_536  # rows from which scale and mean are estimated


def run_train(run: Run) -> dict:
    """Trains the dictionary ``run.name`` ("topk" or "standard") and writes it to ``run.folder``.

    Writes ``checkpoints/``, ``metrics.jsonl`` and ``dictionary/``. An interrupted run goes on at its newest checkpoint
    and ends with the same bits as one that was not.
    """
    config: TrainConfig = run.configs["train"]
    store = Store.open(run.inputs["capture"])
    one_of(config.site, store.sites, "site in this store (--train.site)")
    mesh = make_mesh(run.configs["mesh"])
    dictionary = describe_dictionary(config, run.name, store)
    steps = _steps(config, store)
    check_divides(config, dictionary, mesh)
    mean_D, scale = _statistics(store, config)
    trainer = Trainer(config, dictionary, mesh, steps, scale, mean_D)

    checkpoints = Checkpoints(run.folder / "checkpoints")
    first_step = checkpoints.latest_step or 0
    state = checkpoints.restore(trainer.abstract_state) if first_step else trainer.initial_state()
    axes = "x".join(str(size) for size in mesh.shape.values())
    verb = f"resuming {run.name} at step {first_step}" if first_step else f"training {run.name}"
    run.say(
        f"{verb}: {dictionary.d_in} -> {dictionary.n_features}, {steps} steps of {config.batch} tokens, mesh {axes}"
    )
    metrics = Metrics(run.folder / "metrics.jsonl", first_step, config.batch, config.log_every, steps, run.say)
    batches = training_batches(
        store,
        config.site,
        config.batch,
        config.seed,
        config.epochs,
        first_step,
        jax.process_index(),
        jax.process_count(),
    )
    state = train(
        trainer, state, batches, first_step, steps, metrics, checkpoints, config.checkpoint_every, run.stopping
    )
    checkpoints.close()
    silent = jax.jit(lambda silent_F: jnp.mean(silent_F >= _epoch_tokens(config, store)), out_shardings=sharding(mesh))
    dead_fraction = float(silent(state.silent_F))
    if is_first_process():
        (run.folder / "dictionary" / own.DESCRIPTION).unlink(
            missing_ok=True
        )  # of a run killed between here and its summary
    save_dictionary(run.folder / "dictionary", trainer.finish(state))
    final = {key: value for key, value in metrics.records[-1].items() if key not in ("step", "tokens", "seconds")}
    return dict(
        kind=run.name,
        site=config.site,
        steps=steps,
        tokens=steps * config.batch,
        tokens_per_second=metrics.tokens_per_second(),
        seconds=metrics.records[-1]["seconds"],
        scale=scale,
        dead_fraction=dead_fraction,
        final=final,
        mesh=describe(mesh),
    )


def describe_dictionary(config: TrainConfig, kind: str, store: Store) -> DictionaryConfig:
    """The dictionary that this configuration trains on this store."""
    return dataclasses.replace(
        dictionary_shape(config, kind, store.d(config.site)),
        max_norm=store.max_norm(config.site),
        model=store.model["name"],
        revision=store.model["revision"],
        fingerprint=store.model["fingerprint"],
    )


def dictionary_shape(config: TrainConfig, kind: str, d_in: int) -> DictionaryConfig:
    """The dictionary that this configuration trains on a site of this width, before there are activations."""
    features = config.expansion * d_in
    if config.k > features:
        raise UserError(f"--train.k={config.k} is more than the {features} features: lower it")
    k = config.k if kind == "topk" else 0
    return DictionaryConfig(kind=kind, site=config.site, d_in=d_in, n_features=features, k=k)


def _epoch_tokens(config: TrainConfig, store: Store) -> int:
    return steps_per_epoch(store, config.site, config.batch) * config.batch


def _steps(config: TrainConfig, store: Store) -> int:
    per_epoch = steps_per_epoch(store, config.site, config.batch)
    if per_epoch == 0:
        rows = len(store.rows("train", config.site))
        raise UserError(
            f"the store has {rows} training tokens, fewer than one batch: lower --train.batch={config.batch}"
        )
    steps = per_epoch * config.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


def check_divides(config: TrainConfig, dictionary: DictionaryConfig, mesh: Mesh) -> None:
    """A ``UserError`` unless the mesh divides the batch and the features."""
    if config.batch % mesh.shape["data"]:
        raise UserError(
            f"--train.batch={config.batch} is not divisible by the {mesh.shape['data']} devices on the data axis"
        )
    if dictionary.n_features % mesh.shape["model"]:
        raise UserError(f"{dictionary.n_features} features are not divisible by --mesh.model={mesh.shape['model']}")
    if mesh.shape["member"] > 1:
        raise UserError(f"--mesh.member={mesh.shape['member']}: one dictionary is trained at a time, so it must be 1")


def _statistics(store: Store, config: TrainConfig) -> tuple[np.ndarray, float]:
    """Mean of the training activations, fp64, and the factor that brings their mean norm to sqrt(d)."""
    rows = store.rows("train", config.site)
    if len(rows) > _SAMPLE:
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, _SAMPLE, replace=False))
    acts_NxD = store.read(config.site, rows).astype(np.float64)
    norm = float(np.linalg.norm(acts_NxD, axis=1).mean())
    if norm == 0:
        raise UserError(f"all activations at {config.site} are zero: nothing can be learned from this store")
    return acts_NxD.mean(0), math.sqrt(acts_NxD.shape[1]) / norm
