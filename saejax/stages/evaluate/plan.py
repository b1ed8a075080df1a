"""The programs of the stage ``evaluate``, with shapes in place of arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_params, by_row, spread, whole
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.cross_layer import FORMS
from saejax.evaluation import programs
from saejax.evaluation.loss_recovered import VARIANTS
from saejax.evaluation.member_data import MemberData
from saejax.evaluation.settings import EvaluateConfig
from saejax.flops import head_flops, pass_flops
from saejax.models.lengths import rows_per_batch
from saejax.models.sites import Site, is_joined
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import document_devices, sharding
from saejax.runner.registry import all_stages
from saejax.tasks.settings import CorpusConfig
from saejax.training.settings import TrainConfig


def evaluate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs that measure cross-entropy, for the tested dictionary or else the first."""
    if not plan.stacks:
        return []
    model, first, corpus = plan.model, next(iter(plan.stacks.values())).dictionary, plan.configs[CorpusConfig]
    config, length = plan.configs[EvaluateConfig], -(-min(corpus.context, model.context) // 32) * 32
    rows = rows_per_batch(config.batch_tokens, length, document_devices(mesh))
    used = plan.dictionary("ablate") if all_stages()["ablate"].units(plan.configs) else first
    if is_joined(used.site) or plan.configs[TrainConfig].form in FORMS:
        return []  # whole passes with edits, or layer by layer: programs of other stages
    site, f = Site.parse(used.site), used.n_features
    target = Site.parse(used.target or used.site)
    tokens, variants, point = rows * length, len(VARIANTS), SplitPoint(model, target, site, mesh)
    params, member = abstract_params(model, mesh, plan.dtype), abstract_member(plan, used, mesh)
    ids_BxT, lengths_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    read_BxTxD, value_BxTxO = (spread(mesh, (rows, length, d), plan.dtype) for d in (used.d_in, used.d_out))
    stream_BxTxD = spread(mesh, (rows, length, model.d_model), plan.dtype)
    inside_BxT, limit = spread(mesh, (rows, length), bool), whole(mesh, (), jnp.float32)
    shape = (variants, rows, length, model.d_model)
    where = sharding(mesh, None, *stream_BxTxD.sharding.spec)
    streams = jax.ShapeDtypeStruct(shape, plan.dtype, sharding=where)
    members = [member for stack in plan.stacks.values() for member in stack.members]
    sites = len({(member.site, member.target) for member in members})
    held_out = round(plan.documents * corpus.held_out)
    batches = min(config.ce_documents or held_out, held_out) / rows
    tails = (variants - 1) * sites + len(members)  # clean model and floors once for each site, and every member
    size, layers = f"{rows} x {length} tokens", functools.partial(pass_flops, model, tokens, length)
    head, compare = (point, params, ids_BxT, limit, limit), (model, params, streams, ids_BxT, lengths_B)
    return [
        Program("evaluate: head", size, programs.head, head, member, layers(target.layer + 1), sites * batches),
        Program(
            "evaluate: stand-in",
            size,
            programs.stand_in,
            (member, read_BxTxD, value_BxTxO, inside_BxT),
            params,
            2.0 * tokens * (used.d_in + used.d_out) * f,
            len(members) * batches,
        ),
        Program(
            "evaluate: tail",
            size,
            programs.tail,
            (point, params, stream_BxTxD, value_BxTxO),
            member,
            layers(model.n_layers - target.layer),
            tails * batches,
        ),
        Program(
            "evaluate: compare",
            f"{size}, {variants} variants",
            programs.compare,
            compare,
            member,
            variants * head_flops(model, tokens),
            tails * batches / variants,
        ),
    ]


def abstract_member(plan: PlannedRun, used: DictionaryConfig, mesh: Mesh) -> MemberData:
    """Return the shapes of a dictionary as placed by stages that measure members one by one."""
    common = dataclasses.replace(used, site="", target="", max_norm=0.0)
    return MemberData.abstract(common, "float32", plan.configs[TrainConfig].state_dtype, mesh)
