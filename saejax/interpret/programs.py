"""The large programs of the stage ``interpret``."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.cost import PlannedRun
from saejax.costs.passes import head_flops, pass_flops
from saejax.costs.programs import Program, abstract_params, by_row, whole
from saejax.dictionaries import DictionaryConfig
from saejax.evaluation.cost import abstract_member
from saejax.evaluation.member_data import MemberData
from saejax.interpret import attended, firings, neighbours
from saejax.interpret.interpreter import IN_STREAM, NEAREST, OUTPUT, heads_before
from saejax.models.sites import Site, is_joined
from saejax.parallel.mesh import fitting_sharding
from saejax.settings import CaptureConfig, CorpusConfig
from saejax.stages.interpret import InterpretConfig

Params = dict[str, jax.ShapeDtypeStruct]


def interpret_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs for the widest of the dictionaries that are interpreted; none where none is."""
    stacks = [
        plan.stacks[name].dictionary for name in plan.configs[InterpretConfig].dictionaries if name in plan.stacks
    ]
    stacks = [used for used in stacks if not is_joined(used.site)]
    if not stacks:
        return []
    used = max(stacks, key=lambda one: one.n_features)
    params = abstract_params(plan.model, mesh, plan.dtype)
    member = abstract_member(plan, used, mesh)
    return [
        *_of_firings(plan, used, mesh, params, member),
        *_of_rows(plan, used, mesh, params),
        *_of_attention(plan, used, mesh, params, member),
    ]


def _of_firings(
    plan: PlannedRun, used: DictionaryConfig, mesh: Mesh, params: Params, member: MemberData
) -> list[Program]:
    """Return the programs that encode tokens and pack what fires, beside a frozen-random dictionary as large."""
    rows, d, f = firings.whole_words(plan.configs[InterpretConfig].batch_tokens), used.d_in, used.n_features
    size, packed = f"{rows} tokens x {f} features", rows * f // firings.WORD
    x_BxD = by_row(mesh, (rows, d), plan.configs[CaptureConfig].store_dtype)
    place = fitting_sharding(mesh, (rows, f), "data", "model")
    size_BxF = jax.ShapeDtypeStruct((rows, f), jnp.float32, sharding=place)
    words, ends = whole(mesh, (packed,), jnp.uint32), whole(mesh, (packed,), jnp.int32)
    encode = (mesh, member, x_BxD, rows, whole(mesh, (f,), bool))
    take = (size_BxF, words, ends, 0, firings.ROOM)
    return [
        Program("interpret: encode", size, firings.encode_batch, encode, (params, member), 2.0 * rows * d * f),
        Program("interpret: firings", size, firings.take_firings, take, (params, member, member), 0.0),
    ]


def _of_rows(plan: PlannedRun, used: DictionaryConfig, mesh: Mesh, params: Params) -> list[Program]:
    """Return the programs that read decoder rows by the unembedding and compare them."""
    model, d, f = plan.model, used.d_in, used.n_features
    block, W_dec_FxD = min(neighbours.ROWS, f), whole(mesh, (f, d), jnp.float32)
    nearest = (block, min(NEAREST, f - 1), W_dec_FxD, 0)
    size, flops = f"{block} of {f} features", 2.0 * block * f * d
    found = [Program("interpret: neighbours", size, neighbours.nearest_block, nearest, params, flops)]
    if Site.parse(used.target or used.site).kind in IN_STREAM:
        lens = (model, min(OUTPUT, model.vocab), params, whole(mesh, (block, d), jnp.float32))
        flops = head_flops(model, block)
        found.append(Program("interpret: logit lens", size, neighbours.logit_lens, lens, W_dec_FxD, flops))
    return found


def _of_attention(
    plan: PlannedRun, used: DictionaryConfig, mesh: Mesh, params: Params, member: MemberData
) -> list[Program]:
    """Return the programs that find what the heads before the dictionary's site look at."""
    layers = heads_before(used.site)
    if not plan.configs[InterpretConfig].attention_tokens or not layers:
        return []
    count, length = attended.AT_ONCE, min(attended.LONGEST, plan.configs[CorpusConfig].context)
    ids_BxT, marks_V = whole(mesh, (count, length), jnp.int32), whole(mesh, (plan.model.vocab,), bool)
    given = (plan.model, layers, params, ids_BxT, marks_V)
    flops = pass_flops(plan.model, count * length, length, layers)
    return [Program("interpret: attention", f"{count} x {length} tokens", attended.attended, given, member, flops)]
