"""Cost of the stage ``evaluate``."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.cost import START, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import (
    dictionary_bytes,
    feature_bytes,
    head_flops,
    layer_bytes,
    logit_bytes,
    pass_flops,
    weight_bytes,
    weights_share,
)
from saejax.costs.programs import Program, abstract_params, by_row, whole
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.cross_layer import FORM
from saejax.evaluation import programs
from saejax.evaluation.loss_recovered import VARIANTS
from saejax.evaluation.member_data import MemberData
from saejax.models.lengths import round_length
from saejax.models.sites import Site, decoder_site, is_joined, site_parts
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import fitting_sharding, part_size
from saejax.settings import CorpusConfig, EvaluateConfig, TaskConfig, TrainConfig

_OVERHEAD = 1.5


def evaluate_cost(plan: PlannedRun, kind: str) -> Cost:
    """Return the cost of the held-out cross-entropies: clean model and floors once for each site, and every member."""
    evaluate, model, dtype = plan.configs[EvaluateConfig], plan.model, plan.dtype
    stack, (rows, length) = plan.stacks[kind], _batch(plan)
    used, local = stack.dictionary, part_size(plan.axes, (rows,), "data")
    come_and_go = max(
        layer_bytes(plan, rows, length, dtype) + feature_bytes(used.n_features, local, length),
        layer_bytes(plan, rows, length, dtype, kept=4) + logit_bytes(plan, rows, length),
    )
    held_out = round(plan.documents * plan.configs[CorpusConfig].held_out)
    documents = min(evaluate.ce_documents or held_out, held_out)
    of_document = min(length, round_length(-(-plan.tokens // max(plan.documents, 1))))
    tokens, sites = documents * of_document, {(member.site, member.target) for member in stack.members}
    tails = (len(VARIANTS) - 1) * len(sites) + len(stack.members)
    at = min(decoder_site(part).layer for part in site_parts(used.site))
    layers = len(sites) * at + tails * (model.n_layers - at)
    flops = pass_flops(model, tokens, of_document, layers) + tails * head_flops(model, tokens)
    whole_arrays = dictionary_bytes(used, plan.configs[TrainConfig].state_dtype)
    if plan.configs[TrainConfig].form == FORM:  # all layers at once, and four passes through the model
        count = len(stack.members)
        whole_arrays = round(count * (weights_share(FORM, count) + 0.5) * whole_arrays)
        flops = pass_flops(model, tokens, of_document, 4 * model.n_layers) + 4 * head_flops(model, tokens)
    return Cost(
        DeviceBytes(weight_bytes(model, plan.axes, dtype), whole_arrays, activations=come_and_go),
        flops,
        dtype,
        _OVERHEAD,
        START,
        batches=dict(documents=rows),
    )


def evaluate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs that measure cross-entropy, for the tested dictionary or else the first."""
    rows, length = _batch(plan)
    model, first = plan.model, next(iter(plan.stacks.values())).dictionary
    used = plan.dictionary("ablate") if plan.configs[TaskConfig].has_behaviours else first
    if is_joined(used.site) or plan.configs[TrainConfig].form == FORM:
        return []  # whole passes with edits, or layer by layer: those of other stages
    site, d, f = Site.parse(used.site), used.d_in, used.n_features
    target = Site.parse(used.target or used.site)
    tokens, variants, point = rows * length, len(VARIANTS), SplitPoint(model, target, site, mesh)
    params, member = abstract_params(model, mesh, plan.dtype), abstract_member(plan, used, mesh)
    ids_BxT, lengths_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    value_BxTxD = by_row(mesh, (rows, length, d), plan.dtype)
    inside_BxT, limit = by_row(mesh, (rows, length), bool), whole(mesh, (), jnp.float32)
    shape = (variants, rows, length, d)
    where = fitting_sharding(mesh, shape, None, "data", None, None)
    streams = jax.ShapeDtypeStruct(shape, plan.dtype, sharding=where)
    size, layers = f"{rows} x {length} tokens", functools.partial(pass_flops, model, tokens, length)
    head, compare = (point, params, ids_BxT, limit, limit), (model, params, streams, ids_BxT, lengths_B)
    return [
        Program("evaluate: head", size, programs.head, head, member, layers(target.layer + 1)),
        Program(
            "evaluate: stand-in",
            size,
            programs.stand_in,
            (member, value_BxTxD, value_BxTxD, inside_BxT),
            params,
            4.0 * tokens * d * f,
        ),
        Program(
            "evaluate: tail",
            size,
            programs.tail,
            (point, params, value_BxTxD, value_BxTxD),
            member,
            layers(model.n_layers - target.layer),
        ),
        Program(
            "evaluate: compare",
            f"{size}, {variants} variants",
            programs.compare,
            compare,
            member,
            variants * head_flops(model, tokens),
        ),
    ]


def abstract_member(plan: PlannedRun, used: DictionaryConfig, mesh: Mesh) -> MemberData:
    """Return the shapes of a dictionary as placed by stages that measure members one by one."""
    common = dataclasses.replace(used, site="", target="", max_norm=0.0)
    return MemberData.abstract(common, "float32", plan.configs[TrainConfig].state_dtype, mesh)


def _batch(plan: PlannedRun) -> tuple[int, int]:
    """Return rows and length of a batch of documents."""
    length = min(plan.configs[CorpusConfig].context, plan.model.context)
    length = -(-length // 32) * 32
    return max(1, plan.configs[EvaluateConfig].batch_tokens // length), length
