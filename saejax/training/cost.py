"""What the stage ``train`` takes, and which dictionaries it will train."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.activations.batches import sites_of
from saejax.activations.cost import batch_shape, reading_cost, recorded_rows
from saejax.activations.device_buffers import BY_DOCUMENT, buffer_shapes, buffer_writer
from saejax.activations.joined import single_sites
from saejax.costs.cost import WIDTH, Cost, DeviceBytes, PlannedRun, PlannedStack
from saejax.costs.passes import dictionary_bytes, pass_flops, step_flops, weights_share
from saejax.costs.programs import Program, abstract_params, whole
from saejax.dictionaries import DictionaryConfig
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.sites import Site, decoder_site, is_joined
from saejax.parallel.mesh import part_size
from saejax.settings import CaptureConfig, TrainConfig
from saejax.settings.kinds import PRETRAINED
from saejax.training.each_member import members_at_once
from saejax.training.members import Member, SiteScale, members
from saejax.training.pretrained import Pretrained, find_pretrained
from saejax.training.stack_shape import batch_parts, check_divides, chosen_sites, stack_shape
from saejax.training.train import trainer_of

_OVERHEAD = 0.45
_START = 3.0  # seconds in which the step is compiled and the first batches are read
_STEPS = 1000  # length of the run, of which only the schedules know


def planned_stacks(train: TrainConfig, captured: Sequence[str], model: DecoderConfig) -> dict[str, PlannedStack]:
    """The dictionaries that will be trained on a model, by kind.

    Args:
      captured: the sites that will be in the store.

    Raises:
      UserError: a site does not exist in this model, or is read and not captured, or has another width than a
        dictionary that is there already; k is above the features.
    """
    sites = captured if train.sites == ("all",) else single_sites(train.sites)

    def widths(flag: str, stack: Sequence[Member | Pretrained]) -> dict[str, int]:
        """Of the sites that these members read and predict, all of which are captured."""
        needed = single_sites(site for member in stack for site in (member.site, member.target))
        found = {site: decoder_site(site).check(model).width(model) for site in needed}
        missing = [site for site in needed if site not in captured]
        if missing and train.source == "store":
            raise UserError(f"{flag} needs {', '.join(missing)}, which --capture.sites={','.join(captured)} leaves out")
        return found

    planned = {}
    for kind in train.kinds:
        if kind == PRETRAINED:
            found = find_pretrained(train.pretrained)
            planned[kind] = PlannedStack(_largest(found, widths("--train.pretrained", found)), tuple(found))
        else:
            planned[kind] = _planned(train, kind, chosen_sites(train, sites), widths)
    return planned


def _planned(
    train: TrainConfig, kind: str, sites: Sequence[str], widths: Callable[[str, Sequence[Member]], Mapping[str, int]]
) -> PlannedStack:
    """All members, those of the widest of several expansions last, with its shape."""
    found = []
    for config in sorted(train.each_expansion(), key=lambda config: config.expansion):
        own = members(config, kind, sites)
        shape = stack_shape(config, kind, own, widths("--train.sites", own))
        found += own
    return PlannedStack(shape, tuple(found))


def _largest(found: Sequence[Pretrained], widths: Mapping[str, int]) -> DictionaryConfig:
    for one in found:
        if not is_joined(one.site) and one.config.d_in != widths[one.site]:
            raise UserError(f"{one.place} reads {one.config.d_in} dimensions, but {one.site} has {widths[one.site]}")
    return max((one.config for one in found), key=lambda config: config.d_in * config.n_features)


def train_cost(plan: PlannedRun, kind: str) -> Cost:
    """All members of a stack, their features split over ``model``, themselves over ``member``; and the model they read.

    A cross-layer transcoder has ``weights_share`` times the weights of a stack of transcoders.

    Raises:
      UserError: the mesh does not divide the batch, the features or the members.
    """
    train, stack = plan.configs[TrainConfig], plan.stacks[kind]
    dictionary, count = stack.dictionary, len(stack.members)
    if kind == PRETRAINED:
        copied = sum(dictionary_bytes(one.config, "float32") for one in stack.members)
        return Cost(DeviceBytes(), 0.0, "float32", 1.0, _START, disk=copied)
    widths = [one.features_of(dictionary.d_in) for one in train.each_expansion()]
    count //= len(widths)  # of each expansion
    for width in widths:
        check_divides(train, width, count, plan.axes)
    here, (d, f) = -(-count // plan.axes["member"]), (dictionary.d_in, dictionary.n_features)
    trainer_of(train, kind, stack.members, plan.axes)
    at_once = here
    if train.form != "cross_layer_transcoder":
        at_once = members_at_once(train.members_at_once, count, train.batch, f, plan.axes, plan.platform)
    share = weights_share(train.form, count)
    arrays = round(share * here * dictionary_bytes(dictionary, train.state_dtype, plan.axes))
    batch = part_size(plan.axes, (train.batch, d), "data", None)
    batch += part_size(plan.axes, (train.batch, f), "data", "model")
    rows = recorded_rows(plan)
    seen = min(train.epochs * rows, train.max_steps * train.batch or train.epochs * rows)
    read, flops = DeviceBytes(), share * count * sum(step_flops(seen, d, width) for width in widths)
    if train.source == "model":
        sites = [decoder_site(name) for name in single_sites(n for m in stack.members for n in (m.site, m.target))]
        read, passes = reading_cost(plan, sites, seen)
        by_member = "member" if plan.backend == "jax" else None
        buffer = part_size(plan.axes, (len(sites), min(train.buffer_rows, rows), d), by_member, "data", None)
        read = dataclasses.replace(
            read, activations=read.activations + WIDTH[plan.configs[CaptureConfig].store_dtype] * buffer
        )
        flops += passes * len(widths)
    return Cost(
        DeviceBytes(
            model=read.model,
            dictionary=arrays,
            optimizer=_optimizer_bytes(train, arrays, at_once / here, plan.axes),
            activations=at_once * WIDTH[train.state_dtype] * 4 * batch + read.activations,
        ),
        flops,
        train.matmul,
        _OVERHEAD,
        _START,
        disk=round(
            share * count * 7 * 4 * 2 * d * sum(widths)
        ),  # two checkpoints, with the optimizer's moments, and the arrays
    )


def _optimizer_bytes(train: TrainConfig, arrays: int, at_once: float, axes: Mapping[str, int]) -> int:
    """Adam's two means of so many bytes of arrays, and the gradient of the share that is computed at once."""
    means = 1.5 if train.mu_dtype == "bfloat16" and train.state_dtype == "float32" else 2.0
    return round(arrays * (means / (axes["data"] if train.zero_optimizer else 1) + at_once))


def train_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The step of every stack and, where the JAX decoder makes activations as they are needed, how a buffer is filled.

    There the model, the buffer and the training state are on the devices all the time.

    Raises:
      UserError: the mesh does not divide the batch, the features or the members.
    """
    filled = plan.configs[TrainConfig].source == "model" and plan.backend == "jax"
    programs: list[Program] = []
    for stack in (stack for kind, stack in plan.stacks.items() if kind != PRETRAINED):
        step = _step(plan, stack, mesh)
        if filled and not _joined(stack):
            fill = _fill(plan, stack, mesh)
            params, parts, norms, *_ = fill.arguments
            state, hyper, _ = step.arguments
            programs.append(dataclasses.replace(fill, kept=(state, hyper)))
            step = dataclasses.replace(step, kept=(params, parts, norms))
        programs.append(step)
    return programs


def _joined(stack: PlannedStack) -> bool:
    return any(is_joined(site) for member in stack.members for site in (member.site, member.target))


def _fill(plan: PlannedRun, stack: PlannedStack, mesh: Mesh) -> Program:
    """Its arguments begin with the model's parameters, and the buffer's parts and norms."""
    parts, dtype = batch_parts(stack.members), plan.configs[CaptureConfig].store_dtype
    rows = min(plan.configs[TrainConfig].buffer_rows, recorded_rows(plan) or plan.configs[TrainConfig].buffer_rows)
    (count, length), layers = batch_shape(plan), 1 + max(Site.parse(site).layer for site in sites_of(parts))
    count += -count % (mesh.shape["member"] * mesh.shape["data"])

    def by_document(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, PartitionSpec(BY_DOCUMENT)))

    return Program(
        f"train: {stack.dictionary.kind} buffer",
        f"{rows:,} tokens, by {count} x {length} to layer {layers - 1}",
        buffer_writer(plan.model, mesh, parts, rows, dtype),
        (
            abstract_params(plan.model, mesh, plan.capture_dtype, layers),
            *buffer_shapes(plan.model, mesh, parts, rows, dtype),
            *(by_document(count, length), by_document(count), whole(mesh, (count, length), np.int32)),
        ),
        (),
        pass_flops(plan.model, count * length, length, layers),
    )


def _step(plan: PlannedRun, stack: PlannedStack, mesh: Mesh) -> Program:
    """Its arguments are the state, what is read of the members, and a batch."""
    each, dictionary = plan.configs[TrainConfig].each_expansion(), stack.dictionary
    config = max(each, key=lambda config: config.expansion)
    members = stack.members[-(len(stack.members) // len(each)) :]
    d_in = dictionary.d_in
    check_divides(config, dictionary.n_features, len(members), mesh.shape)
    metric_DxD = np.eye(d_in, dtype=np.float32) if config.whiten_error else None
    scale = SiteScale(1.0, 1.0, np.zeros(d_in, np.float32), metric_DxD=metric_DxD)
    make = trainer_of(config, dictionary.kind, members, mesh.shape)
    trainer = make(config, dictionary, members, mesh, _STEPS, [scale] * len(members))
    shape = (len(trainer.sites), config.batch, d_in)
    batch = jax.ShapeDtypeStruct(shape, plan.configs[CaptureConfig].store_dtype, sharding=trainer.batch_sharding)
    many = f"{len(members)} members, " if len(members) > 1 else ""
    return Program(
        f"train: {dictionary.kind} step",
        f"{many}{config.batch} tokens, {d_in} -> {dictionary.n_features:,}",
        trainer.compiled,
        (trainer.abstract_state, trainer.abstract_hyper, (batch,) if config.form == "sae" else (batch, batch)),
        (),
        weights_share(config.form, len(members)) * len(members) * step_flops(config.batch, d_in, dictionary.n_features),
    )
