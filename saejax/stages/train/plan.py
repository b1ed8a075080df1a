"""The dictionaries that the stage ``train`` will train, and its programs with shapes in place of arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.activations.batches import sites_of
from saejax.activations.device_buffers import buffer_shapes, buffer_writer
from saejax.activations.joined import single_sites
from saejax.activations.settings import CaptureConfig
from saejax.activations.store import DTYPES
from saejax.costs.plan import WIDTH, PlannedRun, PlannedStack
from saejax.costs.programs import Program, abstract_params, by_row, spread, whole
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.kinds import PRETRAINED
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.flops import head_flops, pass_flops, step_flops, weights_share
from saejax.models.config import DecoderConfig
from saejax.models.lengths import round_length, rows_per_batch
from saejax.models.settings import ModelConfig
from saejax.models.sites import Site, decoder_site, is_joined
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import BY_DOCUMENT, document_devices
from saejax.stages.capture.plan import batch_shape, recorded_rows
from saejax.stages.train.pretrained import Pretrained, find_pretrained
from saejax.tasks.settings import CorpusConfig
from saejax.training.checkpoints import KEPT
from saejax.training.finetune import CleanBatch, compile_finetune_step, finetuning_stack
from saejax.training.members import Member, choose_sites, make_members
from saejax.training.scales import SiteScale
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack, batch_parts, check_divides, stack_shape
from saejax.training.state import abstract_state
from saejax.training.step import compile_step

_STEPS = 1000  # length of the run, of which only the schedules know


def planned_stacks(train: TrainConfig, captured: Sequence[str], model: DecoderConfig) -> dict[str, PlannedStack]:
    """Return the dictionaries that will be trained on a model, by kind.

    Args:
      train: the settings.
      captured: the sites that will be in the store.
      model: the model.

    Raises:
      UserError: a site does not exist in this model, or is read and not captured, or has another width than a
        dictionary that is there already; k is above the features.
    """
    # "all" is resolved against the sites that the run will capture: there is no store yet.
    stored = captured if train.sites == ("all",) else single_sites(train.sites)
    sites = None if train.source == "model" else stored

    def widths(flag: str, stack: Sequence[Member | Pretrained]) -> dict[str, int]:
        """Return the widths of the sites that members read and predict, all of which are captured."""
        needed = single_sites(site for member in stack for site in (member.site, member.target))
        width_of_site = {site: decoder_site(site).check(model).width(model) for site in needed}
        missing = [site for site in needed if site not in captured]
        if missing and train.source == "store":
            raise UserError(f"{flag} needs {', '.join(missing)}, which --capture.sites={','.join(captured)} leaves out")
        return width_of_site

    planned = {}
    for kind in train.kinds:
        if kind == PRETRAINED:
            pretrained = find_pretrained(train.pretrained)
            planned[kind] = PlannedStack(
                _largest(pretrained, widths("--train.pretrained", pretrained)), tuple(pretrained)
            )
        else:
            planned[kind] = _plan_members(train, kind, choose_sites(train, sites), widths)
    return planned


def _plan_members(
    train: TrainConfig, kind: str, sites: Sequence[str], widths: Callable[[str, Sequence[Member]], Mapping[str, int]]
) -> PlannedStack:
    """Return all members, members with the most features last, with their shape."""
    members = []
    # The largest are last, because memory is planned for them.
    for size, config in sorted(train.each_size().items(), key=lambda item: item[1].features_of(1)):
        of_size = make_members(config, kind, sites, size)
        shape = stack_shape(config, kind, of_size, widths("--train.sites", of_size))
        members += of_size
    return PlannedStack(shape, tuple(members))


def _largest(pretrained: Sequence[Pretrained], widths: Mapping[str, int]) -> DictionaryConfig:
    for dictionary in (entry for entry in pretrained if not is_joined(entry.site)):
        verbs = dict(
            reads=(dictionary.site, dictionary.config.d_in), writes=(dictionary.target, dictionary.config.d_out)
        )
        for verb, (site, width) in verbs.items():
            if width != widths[site]:
                raise UserError(f"{dictionary.place} {verb} {width} dimensions, but {site} has {widths[site]}")
    return max((dictionary.config for dictionary in pretrained), key=lambda config: config.d_in * config.n_features)


def checkpoint_bytes(plan: PlannedRun) -> int:
    """Return the bytes of dictionaries and of the checkpoints that are kept: parameters and Adam's two means each."""
    train, total = plan.configs[TrainConfig], 0
    for kind, stack in plan.stacks.items():
        means = 2 * WIDTH["float32"] if train.mu_dtype == "float32" else WIDTH["float32"] + WIDTH["bfloat16"]
        kept = 0 if kind == PRETRAINED else KEPT + 1  # where the learning rate begins to fall
        total += sum(_parameters(train, kind, stack)) * (WIDTH["float32"] + kept * (WIDTH[train.state_dtype] + means))
    return total


def host_bytes(plan: PlannedRun) -> int:
    """Return the bytes of host memory that training takes: its buffer of shuffled rows, and a copy of the state.

    A checkpoint is written from the copy while training goes on.
    """
    train = plan.configs[TrainConfig]
    rows = min(train.buffer_rows, recorded_rows(plan) or train.buffer_rows)
    trained = [max(_parameters(train, kind, stack)) for kind, stack in plan.stacks.items() if kind != PRETRAINED]
    # Of several processes each copies what its own devices hold.
    parts = plan.mesh.shape["member"] * plan.mesh.shape["model"]
    share = min(plan.own_devices, parts) / parts if plan.own_devices else 1.0
    return rows * _row_bytes(plan) + round(share * 3 * WIDTH[train.state_dtype] * max(trained, default=0))


def _parameters(train: TrainConfig, kind: str, stack: PlannedStack) -> list[int]:
    """Return the number of parameters that are trained together, for each of several numbers of features."""
    d_in, features, table = stack.dictionary.d_in, stack.dictionary.n_features, parameter_table(stack.dictionary)
    # The stack has all members, and the shape of the widest.
    widths = [features] if kind == PRETRAINED else [config.features_of(d_in) for config in train.each_size().values()]
    of_features = sum(prod(shape) for shape, axes in table.values() if "model" in axes) // features
    others = sum(prod(shape) for shape, axes in table.values() if "model" not in axes)
    count = len(stack.members) // len(widths)
    share = 1.0 if kind == PRETRAINED else weights_share(train.form, count)
    return [round(share * count * (of_features * width + others)) for width in widths]


def resident_bytes(plan: PlannedRun) -> int:
    """Return the bytes of a store on each device if all of its rows are resident there."""
    return -(-recorded_rows(plan) * _row_bytes(plan, plan.mesh.shape["model"]) // plan.mesh.shape["data"])


def _row_bytes(plan: PlannedRun, parts: int = 1) -> int:
    """Return the bytes of a row at all sites, or of the largest part of it if vectors are split into so many."""
    sites = single_sites(site for stack in plan.stacks.values() for m in stack.members for site in (m.site, m.target))
    widths = [decoder_site(site).width(plan.model) for site in sites]
    width = sum(width if width % parts else width // parts for width in widths)
    return width * DTYPES[plan.configs[CaptureConfig].store_dtype].itemsize


def train_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the step of every stack, and of its fine-tuning, and how a buffer is filled as activations are needed.

    There the model, the buffer and the training state are on the devices all the time.

    Raises:
      UserError: the mesh does not divide the batch, the features or the members.
    """
    filled = plan.configs[TrainConfig].source == "model" and plan.configs[ModelConfig].backend != "torch"
    programs: list[Program] = []
    for stack in (stack for kind, stack in plan.stacks.items() if kind != PRETRAINED):
        step = _step(plan, stack, mesh)
        if filled and not any(is_joined(site) for member in stack.members for site in (member.site, member.target)):
            fill = _fill(plan, stack, mesh)
            params, parts, norms, *_ = fill.arguments
            state, hyper, _ = step.arguments
            programs.append(dataclasses.replace(fill, kept=(state, hyper)))
            step = dataclasses.replace(step, kept=(params, parts, norms))
        programs.append(step)
        if plan.configs[TrainConfig].kl_steps:
            programs.append(_finetuning(plan, stack, mesh))
    return programs


def _fill(plan: PlannedRun, stack: PlannedStack, mesh: Mesh) -> Program:
    """Return the program that fills a buffer; its first arguments are the model's parameters, the buffer and norms."""
    parts, dtype = batch_parts(stack.members), DTYPES[plan.configs[CaptureConfig].store_dtype].name
    rows = min(plan.configs[TrainConfig].buffer_rows, recorded_rows(plan) or plan.configs[TrainConfig].buffer_rows)
    (count, length), layers = batch_shape(plan, mesh), 1 + max(Site.parse(site).layer for site in sites_of(parts))

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
        _steps(plan) * plan.configs[TrainConfig].batch / (count * length),
    )


def _steps(plan: PlannedRun) -> float:
    """Estimate the number of steps."""
    train = plan.configs[TrainConfig]
    steps = train.epochs * recorded_rows(plan) / train.batch
    return min(steps, train.max_steps or steps)


def _trained(plan: PlannedRun, stack: PlannedStack, mesh: Mesh) -> TrainStack:
    """Return the members of the largest size as they are trained."""
    dictionary = stack.dictionary
    d_in, d_out, configs = dictionary.d_in, dictionary.d_out, [*plan.configs[TrainConfig].each_size().values()]
    config = max(configs, key=lambda config: config.features_of(d_in))
    members = stack.members[-(len(stack.members) // len(configs)) :]
    check_divides(config, dictionary.n_features, len(members), mesh.shape)
    # A whitening matrix changes the program by its presence, not by its values.
    metric_DxD = np.eye(d_out, dtype=np.float32) if config.whiten_error else None
    scale = SiteScale(1.0, 1.0, np.zeros(d_out, np.float32), metric_DxD=metric_DxD)
    return TrainStack(config, dictionary, members, [scale] * len(members), _STEPS, mesh)


def _step(plan: PlannedRun, stack: PlannedStack, mesh: Mesh) -> Program:
    """Return the training step; its arguments are the state, the members' settings, and a batch."""
    dictionary, trained = stack.dictionary, _trained(plan, stack, mesh)
    config, members, d_in, d_out = trained.config, trained.members, dictionary.d_in, dictionary.d_out
    dtype, widths = DTYPES[plan.configs[CaptureConfig].store_dtype], (d_in,) if config.form == "sae" else (d_in, d_out)
    batch = tuple(
        jax.ShapeDtypeStruct((len(trained.sites), config.batch, width), dtype, sharding=trained.batch_sharding)
        for width in widths
    )
    many = f"{len(members)} members, " if len(members) > 1 else ""
    return Program(
        f"train: {dictionary.kind} step",
        f"{many}{config.batch} tokens, {dictionary.sizes}",
        compile_step(trained),
        (abstract_state(trained), trained.abstract_hyperparams(), batch),
        (),
        weights_share(config.form, len(members))
        * len(members)
        * step_flops(config.batch, d_in, dictionary.n_features, d_out=d_out),
        _steps(plan) * _sizes(plan, stack),
    )


def _sizes(plan: PlannedRun, stack: PlannedStack) -> float:
    """Return the sum of features over all sizes, over the features of the largest; sizes are trained in turn."""
    sizes = [config.features_of(stack.dictionary.d_in) for config in plan.configs[TrainConfig].each_size().values()]
    return sum(sizes) / max(sizes)


def _finetuning(plan: PlannedRun, stack: PlannedStack, mesh: Mesh) -> Program:
    """Return a step of fine-tuning through the model; all states of training stay on the devices meanwhile."""
    trained = _trained(plan, stack, mesh)
    config, model, member = trained.config, plan.model, trained.members[-1]
    single = finetuning_stack(trained, len(trained.members) - 1, config.kl_steps, config.kl_learning_rate)
    site, target = (Site.parse(name) for name in (member.site, member.target))
    length = round_length(min(plan.configs[CorpusConfig].context, model.context))
    devices = document_devices(mesh)
    rows = -(-rows_per_batch(config.batch, length, 1) // devices) * devices
    tokens, layers = rows * length, model.n_layers - target.layer
    stream_BxTxD = spread(mesh, (rows, length, model.d_model), plan.dtype)
    x_BxTxD, y_BxTxO = (spread(mesh, (rows, length, place.width(model)), plan.dtype) for place in (site, target))
    batch = CleanBatch(
        stream_BxTxD,
        x_BxTxD,
        y_BxTxO,
        stream_BxTxD,
        by_row(mesh, (rows, length), np.int32),
        by_row(mesh, (rows,), np.int32),
        whole(mesh, (), np.float32),
        whole(mesh, (), np.float32),
        whole(mesh, (tokens,), np.int32),
        whole(mesh, (rows, length), np.int32),
    )
    hyper = jax.tree.map(lambda leaf: whole(mesh, leaf.shape[1:], leaf.dtype), single.abstract_hyperparams())
    # Forwards and twice backwards, without gradients of weights: twice the forward pass; and the clean model's.
    of_model = pass_flops(model, tokens, length, 2 * layers + model.n_layers) + 3 * head_flops(model, tokens)
    return Program(
        f"train: {stack.dictionary.kind} fine-tuning",
        f"{rows} x {length} tokens",
        compile_finetune_step(single, SplitPoint(model, target, site, mesh)),
        (abstract_state(single), hyper, abstract_params(model, mesh, plan.dtype), batch),
        abstract_state(trained),
        of_model + step_flops(tokens, stack.dictionary.d_in, stack.dictionary.n_features, d_out=stack.dictionary.d_out),
        config.kl_steps * len(trained.members) * _sizes(plan, stack),
    )
