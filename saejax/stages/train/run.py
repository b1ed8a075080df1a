"""The train stage: a stack of dictionaries of one kind, on a captured store or straight from the model."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.batches import sites_of
from saejax.activations.joined import with_joined
from saejax.activations.store import Store
from saejax.config import identity
from saejax.dictionaries import save_dictionary
from saejax.dictionaries.formats import circuit_tracer, own
from saejax.dictionaries.kinds.settings import PRETRAINED
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.parallel.collectives import AgreedStop, is_first_process, process_count
from saejax.parallel.mesh import make_mesh, sharding
from saejax.parallel.settings import MeshConfig
from saejax.results import MeshShape
from saejax.runner.results import load_results
from saejax.runner.workspace import Run
from saejax.stages.train.pretrained import run_pretrained
from saejax.training import cross_layer
from saejax.training.checkpoints import Checkpoints
from saejax.training.init_from import state_from_folder
from saejax.training.inputs import Batches, Source, model_source, open_store
from saejax.training.members import Member, choose_sites, make_members
from saejax.training.metrics import METRICS, Metrics, Wandb, log_folder, split_metrics
from saejax.training.results import TrainResults
from saejax.training.scales import estimate_scales
from saejax.training.settings import MOST_TOKENS, TrainConfig
from saejax.training.stack import TrainStack, batch_parts, check_divides, describe_stack
from saejax.training.state import STATE_VERSION, TrainState, abstract_state, finish_dictionary, init_state
from saejax.training.step import Step, compile_step
from saejax.training.thresholds import calibrate_thresholds


def run_train(run: Run) -> TrainResults | None:
    """Train the members of kind ``run.name`` and write them to ``run.folder``; copy existing ones for "pretrained".

    This writes ``checkpoints/`` and ``metrics.jsonl`` (in a folder for each of several expansions) and ``dictionary/``.
    Each member of a stack has a folder of its own for its ``dictionary/`` and ``metrics.jsonl``, and only members that
    are not there are trained. A cross-layer transcoder is one set, in circuit-tracer's format, in ``run.folder``. An
    interrupted run goes on at its newest checkpoint and ends with the same bits as an uninterrupted one.
    """
    config = run.configs[TrainConfig]
    if run.name == PRETRAINED:
        return run_pretrained(run)
    if config.state_dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError(
            "--train.state_dtype=float64 needs the variable JAX_ENABLE_X64=1: without it JAX has no float64"
        )
    (*_, results) = [_run_expansion(for_expansion(run, expanded)) for expanded in config.each_expansion()]
    if not run.stack or not is_first_process():
        return results
    return TrainResults.of_stack({name: load_results(folder) for name, folder in run.stack.folders.items()})


def for_expansion(run: Run, config: TrainConfig) -> Run:
    """Return the run of one of ``each_expansion``."""
    return dataclasses.replace(run, configs=run.configs | config)


def _run_expansion(run: Run) -> TrainResults | None:
    """Train the members that are not there; None if all are."""
    config = run.configs[TrainConfig]
    # Members come before the source, which reads no sites but theirs.
    store = None if config.source == "model" else Store.open(run.inputs["capture"])
    members = make_members(config, run.name, choose_sites(config, store.sites if store else None))
    if run.stack:
        names = [*run.stack.together]  # in the order of checkpoints, whatever that of the flags is now
        members = sorted((member for member in members if member.name in names), key=lambda m: names.index(m.name))
    if not members:
        return None
    parts = batch_parts(members)
    if store is None:
        return train_stack(run, members, model_source(run, parts))
    rows = with_joined(store, sites_of(parts))
    per_epoch = len(rows.usable("train", *sites_of(parts))) // config.batch
    return train_stack(run, members, Source(rows, per_epoch, lambda stack: open_store(stack, rows, run.say)))


def train_stack(run: Run, members: Sequence[Member], source: Source) -> TrainResults:
    """Train members together, and write each one's ``dictionary/`` to ``run.member_folder(member.name)``.

    Args:
      run: the run, whose name is the kind.
      members: the dictionaries; see ``make_members``.
      source: their activations.

    Returns:
      The results, with those of each member.

    Raises:
      UserError: there are fewer rows than a batch has, or settings that do not fit.
      Interrupted: asked to stop; the state is saved.
    """
    config, mesh = run.configs[TrainConfig], _fitting_mesh(run, len(members))
    dictionary = describe_stack(config, run.name, source.rows, members)
    if source.per_epoch == 0:
        raise UserError(f"the training tokens are fewer than one batch: lower --train.batch={config.batch}")
    steps = min(source.per_epoch * config.epochs, config.max_steps or source.per_epoch * config.epochs)
    if steps < config.accumulate:
        raise UserError(
            f"--train.accumulate={config.accumulate} is more than the {steps} steps of the run: nothing would be "
            "trained: lower it"
        )
    check_divides(config, dictionary.n_features, len(members), mesh.shape)
    # Scales are estimated anew on resuming: they are a function of data and seed alone.
    scales = estimate_scales(source.rows, config, [(member.site, member.target) for member in members])
    stack = TrainStack(config, dictionary, members, scales, steps, mesh)
    folder = log_folder(run.folder, config)
    folder.mkdir(exist_ok=True)
    try:
        with Checkpoints(folder / "checkpoints") as checkpoints:
            state, metrics = _train(run, stack, source, checkpoints)
    finally:
        source.close()
    _save(run, stack, state)
    # A feature is dead if it did not fire in the last epoch.
    dead_after = min(min(source.per_epoch, steps) * config.batch, MOST_TOKENS)
    dead = jax.jit(lambda silent_MxF: jnp.mean(silent_MxF >= dead_after, axis=1), out_shardings=sharding(mesh))
    results = TrainResults(
        kind=run.name,
        steps=steps,
        tokens=steps * config.batch,
        tokens_per_second=metrics.tokens_per_second(),
        seconds=metrics.seconds,
        members=_member_results(stack, metrics, np.asarray(dead(state.silent_MxF))),
        mesh=MeshShape.of(mesh, process_count()),
    )
    if run.stack:
        finished = {index: member.name for index, member in enumerate(members) if run.writes(member.name)}
        if is_first_process():
            split_metrics(folder / METRICS, {name: run.member_folder(name) for name in finished.values()})
        for index, name in finished.items():
            run.finish_member(name, results.of_member(index))
    return results


def _fitting_mesh(run: Run, members: int) -> Mesh:
    """Return the run's mesh; of a stack of which some members are there, as many parts of it as divide the others.

    Args:
      run: the run.
      members: number of members that are trained at once: those of one expansion.

    Raises:
      UserError: see ``make_mesh``.
    """
    config = run.configs[MeshConfig]
    # A mesh that does not fit a whole stack is for ``check_divides`` to refuse, also where it has several expansions.
    if run.stack and len(run.stack.together) < len(run.stack.folders):
        config = dataclasses.replace(config, member=math.gcd(config.member, members), data=0)
    return make_mesh(config)


def _train(run: Run, stack: TrainStack, source: Source, checkpoints: Checkpoints) -> tuple[TrainState, Metrics]:
    """Return the final state with calibrated thresholds, from the newest checkpoint on or from the start."""
    config, names = stack.config, [member.name for member in stack.members]
    described: dict[str, object] = dict(settings=identity(config, run.name), dictionary=identity(stack.dictionary))
    described |= dict(members=names, steps=stack.steps, state=STATE_VERSION)
    checkpoints.check_or_record_run(described)
    first_step = checkpoints.latest_step or 0
    if first_step:
        state = checkpoints.restore(abstract_state(stack))
    elif config.init_from:
        state = state_from_folder(stack, config.init_from, source.rows, run.say)
    else:
        state = init_state(stack)
    verb = f"resuming {run.name} at step {first_step}" if first_step else f"training {run.name}"
    count = f"{len(names)} members, " if len(names) > 1 else ""
    axes = "x".join(str(size) for size in stack.mesh.shape.values())
    run.say(
        f"{verb}: {count}{stack.dictionary.d_in} -> {stack.dictionary.n_features}, {stack.steps} steps of "
        f"{config.batch} tokens, mesh {axes}"
    )
    batches = source.open(stack)
    logs_to_wandb = config.wandb and is_first_process()
    with Wandb(config, run.folder, run.name) if logs_to_wandb else contextlib.nullcontext() as wandb:
        metrics = Metrics(stack, log_folder(run.folder, config) / METRICS, first_step, run.say, wandb)
        state = train_loop(stack, state, batches, first_step, metrics, checkpoints, run.stopping)
    return calibrate_thresholds(stack, state, batches), metrics


def train_loop(
    stack: TrainStack,
    state: TrainState,
    batches: Batches,
    first_step: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    stopping: Callable[[], bool],
    step_fn: Step | None = None,
) -> TrainState:
    """Run the remaining steps; the device never waits for the host.

    Args:
      stack: what is trained.
      state: the state after ``first_step`` steps; donated.
      batches: the training batches.
      first_step: step at which training starts or resumes.
      metrics: takes the metrics of each step.
      checkpoints: takes the state every ``checkpoint_every`` steps, at the end, and when stopping.
      stopping: returns whether the process was asked to stop.
      step_fn: the compiled step; None: ``compile_step(stack)``.

    Raises:
      Interrupted: asked to stop; the state is saved.
    """
    step_fn, agreed_stop, every = step_fn or compile_step(stack), AgreedStop(stopping), stack.config.checkpoint_every
    step = first_step
    while step < stack.steps:
        batch = batches.batch(step)
        if batch is not None:
            state, values = step_fn(state, stack.hyperparams, batch)
            step += 1
            metrics.push(step, values)
        stop = agreed_stop() or batch is None
        # A batch that was not made means that the process was asked to stop meanwhile.
        due = batch is not None and (step % every == 0 or step == stack.steps)
        if due or (stop and step > first_step):
            metrics.flush(check=True)  # a state whose loss is not finite must not become the newest checkpoint
            metrics.write()
            checkpoints.save(step, state)
        if stop and step < stack.steps:
            # Orbax saves in the background: a process that ends at once would leave half a checkpoint.
            checkpoints.wait()
            raise Interrupted(f"stopped at step {step} of {stack.steps}; saved: run the same command to go on")
    checkpoints.wait()
    return state


def _save(run: Run, stack: TrainStack, state: TrainState) -> None:
    """Write the dictionaries, in place of those of a run that was killed between here and its summary."""
    if stack.is_cross_layer:
        if is_first_process():
            circuit_tracer.clear_cross_layer(run.folder)
        layer = functools.partial(cross_layer.finish_layer, stack, state)
        circuit_tracer.save_cross_layer(run.folder, len(stack.members), layer)
        return
    for index, member in enumerate(stack.members):
        if not run.writes(member.name):
            continue
        folder = run.member_folder(member.name) / "dictionary"
        if is_first_process():
            # Without its description the folder counts as no dictionary, whatever stops the writing.
            (folder / own.DESCRIPTION).unlink(missing_ok=True)
        save_dictionary(folder, finish_dictionary(stack, state, index))


def _member_results(stack: TrainStack, metrics: Metrics, dead_M: np.ndarray) -> tuple[TrainedMember, ...]:
    """Return the summary of each member."""
    return tuple(
        TrainedMember(
            name=member.name,
            site=member.site,
            target=member.target,
            settings=dict(member.settings),
            input_scale=scale.input,
            output_scale=scale.output,
            dead_fraction=float(dead),
            final=metrics.last(member.name),
        )
        for member, scale, dead in zip(stack.members, stack.scales, dead_M, strict=True)
    )
