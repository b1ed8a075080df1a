"""Training of a stack in a folder: scales, the loop over steps, checkpoints, metrics, and the dictionaries at the end.

An interrupted training goes on at its newest checkpoint and ends with the same bits as an uninterrupted one.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.config import identity
from saejax.dictionaries import save_dictionary
from saejax.dictionaries.formats import circuit_tracer, own
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.parallel.collectives import AgreedStop, is_first_process, process_count
from saejax.parallel.mesh import sharding
from saejax.results import MeshShape
from saejax.training import cross_layer
from saejax.training.checkpoints import Checkpoints
from saejax.training.init_from import state_from_folder
from saejax.training.inputs import Batches, Source
from saejax.training.members import Member
from saejax.training.metrics import METRICS, Metrics, Wandb, log_folder
from saejax.training.results import TrainResults
from saejax.training.scales import estimate_scales
from saejax.training.settings import MOST_TOKENS, TrainConfig
from saejax.training.stack import TrainStack, check_divides, describe_stack
from saejax.training.state import STATE_VERSION, TrainState, abstract_state, finish_dictionary, init_state
from saejax.training.step import Step, compile_step
from saejax.training.thresholds import calibrate_thresholds


@dataclasses.dataclass(frozen=True)
class TrainFolders:
    """The folders in which a stack is trained."""

    root: Path  #: of checkpoints and metrics, see ``log_folder``; and of a cross-layer transcoder's files
    #: where the ``dictionary/`` of each member is written, by its name; members that are not here are not written.
    members: Mapping[str, Path]
    wandb: Path  #: where wandb writes
    started: str = ""  #: text that tells this training from an earlier one in the same folder, for wandb

    @classmethod
    def inside(cls, root: Path, members: Sequence[Member]) -> "TrainFolders":
        """Return folders that are all in one, those of members by their names."""
        return cls(root, {member.name: root / member.name for member in members}, root)


def check_state_dtype(config: TrainConfig) -> None:
    """Raise a ``UserError`` if JAX would train in float32 in place of ``--train.state_dtype=float64``."""
    if config.state_dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError(
            "--train.state_dtype=float64 needs the variable JAX_ENABLE_X64=1: without it JAX has no float64"
        )


def train_stack(
    config: TrainConfig,
    kind: str,
    members: Sequence[Member],
    source: Source,
    mesh: Mesh,
    folders: TrainFolders,
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
) -> TrainResults:
    """Train members together and write their dictionaries, or go on with a training that was interrupted.

    Args:
      config: settings with one expansion, as from ``each_expansion``.
      kind: kind of the dictionaries.
      members: the dictionaries; see ``make_members``.
      source: their activations.
      mesh: the devices.
      folders: where everything is written.
      say: logs lines of progress.
      stopping: returns whether the process was asked to stop.

    Returns:
      The results, with those of each member.

    Raises:
      UserError: there are fewer rows than a batch has, or settings that do not fit.
      Interrupted: asked to stop; the state is saved.
    """
    dictionary = describe_stack(config, kind, source.rows, members)
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
    folder = log_folder(folders.root, config)
    folder.mkdir(exist_ok=True)
    try:
        with Checkpoints(folder / "checkpoints") as checkpoints:
            state, kept_M, metrics = _train(stack, kind, source, folders, checkpoints, say, stopping)
    finally:
        source.close()
    _save(stack, state, kept_M, folders)
    # A feature is dead if it did not fire in the last epoch.
    dead_after = min(min(source.per_epoch, steps) * config.batch, MOST_TOKENS)
    dead = jax.jit(lambda silent_MxF: jnp.mean(silent_MxF >= dead_after, axis=1), out_shardings=sharding(mesh))
    return TrainResults(
        kind=kind,
        steps=steps,
        tokens=steps * config.batch,
        tokens_per_second=metrics.tokens_per_second(),
        seconds=metrics.seconds,
        members=_member_results(stack, metrics, np.asarray(dead(state.silent_MxF))),
        mesh=MeshShape.of(mesh, process_count()),
    )


def _train(
    stack: TrainStack,
    kind: str,
    source: Source,
    folders: TrainFolders,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
    stopping: Callable[[], bool],
) -> tuple[TrainState, jax.Array | None, Metrics]:
    """Return the final state, from the newest checkpoint on or from the start, and thresholds for it."""
    config, names = stack.config, [member.name for member in stack.members]
    described: dict[str, object] = dict(settings=identity(config, kind), dictionary=identity(stack.dictionary))
    described |= dict(members=names, steps=stack.steps, state=STATE_VERSION)
    checkpoints.check_or_record_run(described)
    first_step = checkpoints.latest_step or 0
    if first_step:
        state = checkpoints.restore(abstract_state(stack))
    elif config.init_from:
        state = state_from_folder(stack, config.init_from, source.rows, say)
    else:
        state = init_state(stack)
    verb = f"resuming {kind} at step {first_step}" if first_step else f"training {kind}"
    count = f"{len(names)} members, " if len(names) > 1 else ""
    axes = "x".join(str(size) for size in stack.mesh.shape.values())
    say(
        f"{verb}: {count}{stack.dictionary.d_in} -> {stack.dictionary.n_features}, {stack.steps} steps of "
        f"{config.batch} tokens, mesh {axes}"
    )
    batches, folder = source.open(stack), log_folder(folders.root, config)
    logs_to_wandb = config.wandb and is_first_process()
    run = Wandb(config, folder, kind, folders.wandb, folders.started) if logs_to_wandb else contextlib.nullcontext()
    with run as wandb:
        metrics = Metrics(stack, folder / METRICS, first_step, say, wandb)
        state = train_loop(stack, state, batches, first_step, metrics, checkpoints, stopping)
    return state, calibrate_thresholds(stack, state, batches), metrics


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


def _save(stack: TrainStack, state: TrainState, kept_M: jax.Array | None, folders: TrainFolders) -> None:
    """Write the dictionaries, in place of those of a run that was killed between here and its summary."""
    if stack.is_cross_layer:
        if is_first_process():
            circuit_tracer.clear_cross_layer(folders.root)
        layer = functools.partial(cross_layer.finish_layer, stack, state, kept_L=kept_M)
        circuit_tracer.save_cross_layer(folders.root, len(stack.members), layer)
        return
    for index, member in enumerate(stack.members):
        if member.name not in folders.members:
            continue
        folder = folders.members[member.name] / "dictionary"
        if is_first_process():
            # Without its description the folder counts as no dictionary, whatever stops the writing.
            (folder / own.DESCRIPTION).unlink(missing_ok=True)
        save_dictionary(folder, finish_dictionary(stack, state, index, kept_M))


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
