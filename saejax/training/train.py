"""The train stage: a stack of dictionaries of one kind on sites of a captured store."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.activations.batches import Parts, sites_of
from saejax.activations.joined import with_joined
from saejax.activations.store import Store
from saejax.dictionaries import save_dictionary
from saejax.dictionaries.cross_layer import FORM
from saejax.dictionaries.formats import circuit_tracer, own
from saejax.dictionaries.results import TrainedMember
from saejax.errors import UserError
from saejax.parallel.collectives import is_first_process, process_count
from saejax.parallel.mesh import make_mesh, sharding
from saejax.results import MeshShape
from saejax.runner.config import identity
from saejax.runner.workspace import Run
from saejax.settings import MOST_TOKENS, MeshConfig, TrainConfig
from saejax.settings.kinds import PRETRAINED
from saejax.training.checkpoints import Checkpoints
from saejax.training.cross_layer import CrossLayerTrainer, check_layers
from saejax.training.initial import state_from_dictionary
from saejax.training.inputs import Input, make_input
from saejax.training.loop import Metrics, train
from saejax.training.members import Member, members
from saejax.training.model_input import FromModel, buffer_order, open_stream
from saejax.training.pretrained import run_pretrained
from saejax.training.records import METRICS, log_folder
from saejax.training.results import TrainResults
from saejax.training.scales import ScaledRows, site_scales
from saejax.training.stack_shape import batch_parts, check_divides, chosen_sites, describe_stack, named_sites
from saejax.training.state import STATE_VERSION, TrainState
from saejax.training.step import Trainer
from saejax.training.writers import make_writers


def run_train(run: Run) -> TrainResults:
    """Trains the members of kind ``run.name`` and writes them to ``run.folder``, or copies those there are.

    Writes ``checkpoints/`` and ``metrics.jsonl`` (in a folder for each of several expansions) and, for each member,
    ``dictionary/`` (in a folder of the member's name if there are several); a cross-layer transcoder is one set, in
    circuit-tracer's format, in ``run.folder`` itself. An interrupted run goes on at its newest checkpoint and ends with
    the same bits as one that was not.
    """
    config = run.configs[TrainConfig]
    if run.name == PRETRAINED:
        return run_pretrained(run)
    if config.state_dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError(
            "--train.state_dtype=float64 needs the variable JAX_ENABLE_X64=1: without it JAX has no float64"
        )
    return TrainResults.of_all([_run_one(of_expansion(run, one)) for one in config.each_expansion()])


def of_expansion(run: Run, config: TrainConfig) -> Run:
    """The part of a run that trains the stack of one of ``each_expansion``."""
    return dataclasses.replace(run, configs=run.configs | config)


def _run_one(run: Run) -> TrainResults:
    config = run.configs[TrainConfig]
    if config.source == "store":
        store = Store.open(run.inputs["capture"])
        stack = members(config, run.name, chosen_sites(config, store.sites))
        parts = batch_parts(stack)
        return train_stack(run, stack, _stored(run, with_joined(store, sites_of(parts)), parts))
    stack = members(config, run.name, named_sites(config))
    return train_stack(run, stack, _streamed(run, batch_parts(stack)))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a stack's activations come from.

    Attributes:
      rows: tells widths, norms and the model, and gives the rows from which scales are estimated.
      per_epoch: batches of a pass.
      open: makes the input of a trainer, given the first step and the mode that a run which goes on had.
      close: gives its memory back.
    """

    rows: ScaledRows
    per_epoch: int
    open: Callable[[Trainer, int, str], Input]
    close: Callable[[], None] = lambda: None


def _stored(run: Run, store: Store, parts: Parts) -> Source:
    return Source(
        store,
        len(store.usable("train", *sites_of(parts))) // run.configs[TrainConfig].batch,
        lambda trainer, first_step, before: make_input(trainer, store, parts, first_step, before, run.say),
    )


def _streamed(run: Run, parts: Parts) -> Source:
    stream = open_stream(run, parts)
    per_epoch = buffer_order(run.configs[TrainConfig], stream).per_epoch
    return Source(
        stream, per_epoch, lambda trainer, first_step, before: FromModel(trainer, stream, parts), stream.close
    )


def train_stack(run: Run, stack: Sequence[Member], source: Source) -> TrainResults:
    """Trains the members of a stack, as ``run_train`` says.

    Raises:
      UserError: there are fewer rows than a batch has, or settings that do not fit.
      Interrupted: asked to stop; what was done is saved.
    """
    config = run.configs[TrainConfig]
    mesh, store = make_mesh(run.configs[MeshConfig]), source.rows
    dictionary = describe_stack(config, run.name, store, stack)
    per_epoch = source.per_epoch
    if per_epoch == 0:
        raise UserError(f"the training tokens are fewer than one batch: lower --train.batch={config.batch}")
    steps = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    check_divides(config, dictionary.n_features, len(stack), mesh.shape)
    make = trainer_of(config, run.name, stack, mesh.shape)
    trainer = make(config, dictionary, stack, mesh, steps, site_scales(store, config, stack, batch_parts(stack)))
    folder = log_folder(run.folder, config)
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints, config.best) as checkpoints:
        state, metrics = _train(run, trainer, source, steps, checkpoints)
        best_step = checkpoints.best_step
    silent_for = min(min(per_epoch, steps) * config.batch, MOST_TOKENS)
    silent = jax.jit(lambda silent_MxF: jnp.mean(silent_MxF >= silent_for, axis=1), out_shardings=sharding(mesh))
    results = _member_results(trainer, metrics, np.asarray(silent(state.silent_MxF)))
    _save(run, trainer, state)
    return TrainResults(
        kind=run.name,
        steps=steps,
        tokens=steps * config.batch,
        tokens_per_second=metrics.tokens_per_second(),
        seconds=metrics.seconds,
        members=results,
        mesh=MeshShape.of(mesh, process_count()),
        best_checkpoint=best_step if config.best else None,
    )


def _save(run: Run, trainer: Trainer, state: TrainState) -> None:
    """Writes the dictionaries, in place of those of a run that was killed between here and its summary."""
    if isinstance(trainer, CrossLayerTrainer):
        if is_first_process():
            circuit_tracer.clear_cross_layer(run.folder)
        return circuit_tracer.save_cross_layer(
            run.folder, len(trainer.members), functools.partial(trainer.finished_layer, state)
        )
    for index, member in enumerate(trainer.members):
        folder = run.folder / member.name / "dictionary"
        if is_first_process():
            (folder / own.DESCRIPTION).unlink(missing_ok=True)
        save_dictionary(folder, trainer.finish(state, index))


def trainer_of(config: TrainConfig, kind: str, stack: Sequence[Member], axes: Mapping[str, int]) -> type[Trainer]:
    """The class that trains a stack.

    Raises:
      UserError: the members make no cross-layer transcoder, if they are to be one.
    """
    if config.form != FORM:
        return Trainer
    check_layers(config, kind, stack, axes)
    return CrossLayerTrainer


def _train(
    run: Run, trainer: Trainer, source: Source, steps: int, checkpoints: Checkpoints
) -> tuple[TrainState, Metrics]:
    """The state after all steps, from the newest checkpoint on, or from the start."""
    config, dictionary = trainer.config, trainer.dictionary
    names = [member.name for member in trainer.members]
    settings = identity(config, run.name)
    described = dict(
        settings=settings, dictionary=identity(dictionary), members=names, steps=steps, state=STATE_VERSION
    )
    recorded, first_step = checkpoints.agree(described), checkpoints.latest_step or 0
    folder = log_folder(run.folder, config)
    writers = make_writers(config, folder, run.name, first_step)
    if first_step:
        state = checkpoints.restore(trainer.abstract_state)
    else:
        if config.widen != "random":
            run.say(f"looking for what {config.init_from} lacks, which may take minutes")
        start = functools.partial(state_from_dictionary, trainer, config.init_from, source.rows, run.say)
        state = start() if config.init_from else trainer.initial_state()
    axes = "x".join(str(size) for size in trainer.mesh.shape.values())
    verb = f"resuming {run.name} at step {first_step}" if first_step else f"training {run.name}"
    many = f"{len(names)} members, " if len(names) > 1 else ""
    run.say(
        f"{verb}: {many}{dictionary.d_in} -> {dictionary.n_features}, {steps} steps of {config.batch} tokens, "
        f"mesh {axes}"
    )
    given = source.open(trainer, first_step, recorded.get("input", ""))
    checkpoints.record(described | dict(input=given.mode))
    every, path = config.log_every, folder / METRICS
    metrics = Metrics(path, first_step, config.batch, every, steps, names, run.say, writers)
    try:
        state = train(given, state, first_step, steps, metrics, checkpoints, config.checkpoint_every, run.stopping)
    finally:
        for writer in writers:
            writer.close()
        source.close()
    return state, metrics


def _member_results(trainer: Trainer, metrics: Metrics, dead_M: np.ndarray) -> tuple[TrainedMember, ...]:
    """What the summary says of each member."""
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
        for member, scale, dead in zip(trainer.members, trainer.scales, dead_M, strict=True)
    )
