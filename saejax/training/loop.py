"""Training of a stack in a folder: scales, the loop over steps, checkpoints, metrics, and the dictionaries at the end.

An interrupted training goes on at its newest checkpoint and ends with the same bits as an uninterrupted one.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.config import counted
from saejax.dictionaries import save_dictionary
from saejax.dictionaries.formats import circuit_tracer, own
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.results import StandIn, TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.parallel.collectives import AgreedStop, is_first_process, process_count, wait_for_all
from saejax.parallel.mesh import sharding
from saejax.results import MeshShape
from saejax.training import cross_layer
from saejax.training.checkpoints import Checkpoints
from saejax.training.held_out import HeldOutScorer, LossScorer
from saejax.training.init_from import state_from_folder
from saejax.training.inputs import Batches, Source
from saejax.training.longer import CHECKPOINTS, go_on_from_earlier
from saejax.training.members import Member
from saejax.training.metrics import METRICS, Metrics, Wandb
from saejax.training.optimizer import decay_start
from saejax.training.results import TrainResults
from saejax.training.scales import estimate_scales
from saejax.training.settings import MOST_TOKENS, TrainConfig
from saejax.training.stack import TrainStack, check_divides, describe_stack
from saejax.training.state import STATE_VERSION, TrainState, abstract_state, finish_dictionary, init_state
from saejax.training.step import Step, compile_step
from saejax.training.thresholds import Calibration

STEPS = "steps"  # folder of the dictionaries that are saved while training goes on


@dataclasses.dataclass(frozen=True)
class TrainFolders:
    """The folders in which a stack is trained."""

    root: Path  #: of checkpoints and metrics, see ``logs``; and of a cross-layer transcoder's files
    #: where the ``dictionary/`` of each member is written, by its name; members that are not here are not written.
    members: Mapping[str, Path]
    wandb: Path  #: where wandb writes
    started: str = ""  #: text that tells this training from an earlier one in the same folder, for wandb
    #: roots of trainings of the same members on the same inputs that may begin alike; see ``longer``.
    earlier: Sequence[Path] = ()
    size: str = ""  #: name of one of several numbers of features, see ``TrainConfig.each_size``

    @classmethod
    def inside(cls, root: Path, members: Sequence[Member]) -> "TrainFolders":
        """Return folders that are all in one, the members' by their names."""
        return cls(root, {member.name: root / member.name for member in members}, root)

    @property
    def logs(self) -> Path:
        """The folder of checkpoints and metrics: the root, or a folder in it for each of several sizes."""
        return self.root / self.size

    def at(self, stack: TrainStack, step: int = 0) -> list[Path]:
        """Return where the dictionaries that are written are at a step; 0: at the end.

        They are in the order of members; a cross-layer transcoder is one.
        """
        places = [self.members[member.name] for member in stack.members if member.name in self.members]
        places = [self.root] if stack.is_cross_layer else places
        return [place / STEPS / str(step) for place in places] if step else places


@dataclasses.dataclass(frozen=True)
class Listener:
    """A caller that hears how far training is, and may ask it to stop."""

    say: Callable[[str], None] = print  #: logs lines of progress
    stopping: Callable[[], bool] = lambda: False  #: returns whether the process was asked to stop


def check_state_dtype(config: TrainConfig) -> None:
    """Raise a ``UserError`` if JAX would train in float32 in place of ``--train.state_dtype=float64``."""
    if config.state_dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError(
            "--train.state_dtype=float64 needs the variable JAX_ENABLE_X64=1: without it JAX has no float64"
        )


def train_stack(
    config: TrainConfig,
    members: Sequence[Member],
    source: Source,
    mesh: Mesh,
    folders: TrainFolders,
    listener: Listener,
) -> TrainResults:
    """Train members together and write their dictionaries, or go on with a training that was interrupted.

    Args:
      config: settings with one number of features, as from ``each_size``.
      members: the dictionaries, of one kind; see ``make_members``.
      source: their activations.
      mesh: the devices.
      folders: where everything is written.
      listener: takes lines of progress, and says when to stop.

    Returns:
      The results, with each member's.

    Raises:
      UserError: there are fewer rows than a batch has, or settings that do not fit.
      Interrupted: asked to stop; the state is saved.
    """
    dictionary = describe_stack(config, source.rows, members)
    if source.per_epoch == 0:
        raise UserError(f"the training tokens are fewer than one batch: lower --train.batch={config.batch}")
    steps = config.count_steps(source.per_epoch)
    check_divides(config, dictionary.n_features, len(members), mesh.shape)
    # Scales are estimated anew on resuming: they are a function of data and seed alone.
    scales = estimate_scales(source.rows, config, [(member.site, member.target) for member in members])
    stack = TrainStack(config.with_dead_tokens(source.per_epoch), dictionary, members, scales, steps, mesh)
    folder = folders.logs
    folder.mkdir(exist_ok=True)
    described = _describe_run(stack)
    if is_first_process():
        go_on_from_earlier(stack, described, folder, [root / folders.size for root in folders.earlier], listener.say)
    wait_for_all("an earlier run was taken over")
    try:
        with Checkpoints(folder / CHECKPOINTS, decay_start(config, steps)) as checkpoints:
            checkpoints.check_or_record_run(described)
            state, kept_M, metrics, scores = _train(stack, source, folders, checkpoints, listener)
    finally:
        source.close()
    save_members(stack, state, kept_M, folders)
    # A feature is dead if it did not fire in the last epoch.
    dead_after = min(min(source.per_epoch, steps) * config.batch, MOST_TOKENS)
    dead = jax.jit(lambda silent_MxF: jnp.mean(silent_MxF >= dead_after, axis=1), out_shardings=sharding(mesh))
    return TrainResults(
        kind=stack.kind.name,
        steps=steps,
        tokens=steps * config.batch,
        tokens_per_second=metrics.tokens_per_second(),
        seconds=metrics.seconds,
        members=_member_results(stack, metrics, np.asarray(dead(state.silent_MxF)), scores),
        mesh=MeshShape.of(mesh, process_count()),
    )


def _describe_run(stack: TrainStack) -> dict[str, Any]:
    """Return what the states of a run depend on besides its inputs, as JSON data."""
    return dict(
        settings=stack.config.read_by(stack.kind.name),
        dictionary=counted(stack.dictionary),
        members=[member.name for member in stack.members],
        steps=stack.steps,
        state=STATE_VERSION,
    )


def _train(
    stack: TrainStack,
    source: Source,
    folders: TrainFolders,
    checkpoints: Checkpoints,
    listener: Listener,
) -> tuple[TrainState, jax.Array | None, Metrics, Sequence[tuple[StandIn, StandIn]]]:
    """Train from the newest checkpoint on or from the start, and fine-tune.

    Returns:
      The final state, thresholds for it, the metrics, and each member's scores before and after fine-tuning, if any.
    """
    config, kind, say = stack.config, stack.kind.name, listener.say
    first_step = checkpoints.latest_step or 0
    if first_step:
        state = checkpoints.restore(abstract_state(stack))
    elif config.init_from:
        state = state_from_folder(stack, config.init_from, source.rows, say)
    else:
        state = init_state(stack)
    verb = f"resuming {kind} at step {first_step}" if first_step else f"training {kind}"
    count = f"{len(stack.members)} members, " if len(stack.members) > 1 else ""
    axes = "x".join(str(size) for size in stack.mesh.shape.values())
    say(f"{verb}: {count}{stack.dictionary.sizes}, {stack.steps} steps of {config.batch} tokens, mesh {axes}")
    batches, folder = source.open(stack), folders.logs
    calibrate = Calibration(stack)
    is_due = 0 < config.score_every * config.ce_every <= stack.steps
    loss_scorer = source.loss_scorer(stack) if source.loss_scorer and is_due else None
    midway = Midway(stack, calibrate, _make_scorer(stack, source, say), loss_scorer, folders)
    logs_to_wandb = config.wandb and is_first_process()
    # The workdir tells runs of one project apart.
    name = "/".join([folders.wandb.absolute().name, *folder.relative_to(folders.root).parts, kind])
    run = Wandb(config, folder, name, folders.wandb, folders.started) if logs_to_wandb else contextlib.nullcontext()
    with run as wandb:
        metrics = Metrics(stack, folder / METRICS, first_step, say, wandb)
        state = train_loop(stack, state, batches, LoopOutputs(metrics, checkpoints, midway), listener.stopping)
        scores: Sequence[tuple[StandIn, StandIn]] = ()
        if source.finetune:  # without checkpoints of its own: it is short, and begins again after the last one
            tuned = source.finetune(stack, state, lambda state: calibrate(state, batches, stack.steps))
            metrics.add_finetuning(tuned.records)
            state, scores = tuned.state, tuned.scores
    return state, calibrate(state, batches, stack.steps), metrics, scores


def _make_scorer(stack: TrainStack, source: Source, say: Callable[[str], None]) -> HeldOutScorer | None:
    """Return a scorer if the run is long enough to be scored, and there are held-out tokens."""
    if not 0 < stack.config.score_every <= stack.steps:
        return None
    scorer = HeldOutScorer.of(stack, source.rows)
    if scorer is None:
        say("no scores while training: these activations have too few held-out tokens")
    return scorer


@dataclasses.dataclass(frozen=True)
class Midway:
    """Scores every ``score_every`` steps, and dictionaries every ``save_every``, while training goes on."""

    stack: TrainStack
    calibrate: Calibration  #: gives thresholds as the end does
    scorer: HeldOutScorer | None  #: None: there are no scores
    loss_scorer: LossScorer | None  #: for each ``ce_every``-th of the scores; None: there is no model
    folders: TrainFolders  #: where dictionaries are saved, each in ``steps/STEP/``

    def __call__(self, step: int, state: TrainState, batches: Batches) -> Arrays | None:
        """Return the scores [M] of a step, none if they are not due, and save dictionaries if that is due.

        None if the process was asked to stop before a batch for the thresholds was made.
        """
        config, scores, saves = self.stack.config, self._scores(step), self._saves(step)
        if not scores and not saves:
            return {}
        try:
            kept_M = self.calibrate(state, batches, step)
        except Interrupted:
            return None
        if saves:
            save_members(self.stack, state, kept_M, self.folders, step)
        measured = self.scorer(state, kept_M) if self.scorer and scores else {}
        if measured and self.loss_scorer and step % (config.score_every * config.ce_every) == 0:
            measured |= self.loss_scorer(state, kept_M)
        return measured

    def is_missing(self, step: int) -> bool:
        """Return whether dictionaries of this step, or a cross-layer transcoder, are due and are not all there."""
        return self._saves(step) and not all(
            (folder / "dictionary" / own.DESCRIPTION).exists() or circuit_tracer.is_cross_layer(folder)
            for folder in self.folders.at(self.stack, step)
        )

    def _scores(self, step: int) -> bool:
        return self.scorer is not None and step % self.stack.config.score_every == 0

    def _saves(self, step: int) -> bool:
        every = self.stack.config.save_every
        return bool(every) and step > 0 and step % every == 0


@dataclasses.dataclass(frozen=True)
class LoopOutputs:
    """The takers of metrics, states, scores and dictionaries of the loop over steps."""

    metrics: Metrics  #: takes the metrics of each step
    checkpoints: Checkpoints  #: takes states
    midway: Midway | None = None  #: makes scores and files of the state while training goes on


def train_loop(
    stack: TrainStack,
    state: TrainState,
    batches: Batches,
    outputs: LoopOutputs,
    stopping: Callable[[], bool],
    step_fn: Step | None = None,
) -> TrainState:
    """Run the remaining steps; the device never waits for the host.

    Args:
      stack: what is trained.
      state: the state at the step of the newest checkpoint, or the initial one; donated.
      batches: the training batches.
      outputs: takes metrics and states. A state is saved every ``checkpoint_every`` steps, where the learning rate
        begins to fall, at the end, and when stopping.
      stopping: returns whether the process was asked to stop.
      step_fn: the compiled step; None: ``compile_step(stack)``.

    Raises:
      Interrupted: asked to stop; the state is saved.
    """
    step_fn, agreed_stop, every = step_fn or compile_step(stack), AgreedStop(stopping), stack.config.checkpoint_every
    metrics, checkpoints, midway = outputs.metrics, outputs.checkpoints, outputs.midway
    decays = decay_start(stack.config, stack.steps)
    step = first_step = checkpoints.latest_step or 0
    if midway and midway.is_missing(step):  # it was asked to stop before they could be made
        midway(step, state, batches)
    while step < stack.steps:
        batch, scores = batches.batch(step), None
        if batch is not None:
            state, values = step_fn(state, stack.hyperparams, batch)
            step += 1
            scores = midway(step, state, batches) if midway else {}
            metrics.push(step, values | (scores or {}))
        stop = agreed_stop() or scores is None
        # A batch that was not made means that the process was asked to stop meanwhile.
        due = batch is not None and (step % every == 0 or step in (decays, stack.steps))
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


def save_members(
    stack: TrainStack, state: TrainState, kept_M: jax.Array | None, folders: TrainFolders, step: int = 0
) -> None:
    """Write the dictionaries, in place of files of a run that was killed meanwhile.

    Args:
      stack: what is trained.
      state: the state.
      kept_M: result of ``Calibration`` at this state.
      folders: where they are written.
      step: number of steps done, of dictionaries that are saved while training goes on; 0: at the end.
    """
    if stack.is_cross_layer:
        (folder,) = folders.at(stack, step)
        if is_first_process():
            folder.mkdir(parents=True, exist_ok=True)
            circuit_tracer.clear_cross_layer(folder)
        layer = functools.partial(cross_layer.finish_layer, stack, state, kept_L=kept_M)
        circuit_tracer.save_cross_layer(folder, len(stack.members), layer)
        return
    written = [index for index, member in enumerate(stack.members) if member.name in folders.members]
    for index, folder in zip(written, folders.at(stack, step), strict=True):
        if is_first_process():
            # Without its description the folder counts as no dictionary, whatever stops the writing.
            (folder / "dictionary" / own.DESCRIPTION).unlink(missing_ok=True)
        save_dictionary(folder / "dictionary", finish_dictionary(stack, state, index, kept_M))


def _member_results(
    stack: TrainStack, metrics: Metrics, dead_M: np.ndarray, scores: Sequence[tuple[StandIn, StandIn]]
) -> tuple[TrainedMember, ...]:
    """Return the summary of each member, with its scores before and after fine-tuning if there are any."""
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
            finetuned=scores[index] if scores else None,
        )
        for index, (member, scale, dead) in enumerate(zip(stack.members, stack.scales, dead_M, strict=True))
    )
