"""The large programs of the stage ``transfer``, with shapes in place of arrays."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.costs.cost import PlannedRun
from saejax.costs.passes import pass_flops
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, whole
from saejax.dictionaries import DictionaryConfig
from saejax.matching import match
from saejax.matching.transfer import activity
from saejax.models.language_model import forward
from saejax.models.lengths import round_length, rows_per_batch
from saejax.models.sites import Site
from saejax.parallel.mesh import AXES
from saejax.settings import CorpusConfig, TrainConfig
from saejax.stages.transfer import TransferConfig


def transfer_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """All rows of the two largest dictionaries beside each other; and the text that is read for their activity."""
    config = plan.configs[TransferConfig]
    sizes = plan.dictionaries(config.dictionaries)
    if len(sizes) < 2:
        return []
    few, many = sorted(sizes, key=lambda size: size.n_features)[-2:]
    widths = {"activity": config.tokens // 2, "": max(few.d_in, many.d_in)}  # half of the text chooses
    wide = max(widths["activity" if measure == "activity" else ""] for measure in config.measures)
    found = [_matching(plan, mesh, few.n_features, many.n_features, wide)]
    if "activity" in config.measures or config.reconstruction:
        found += [text_program(plan, mesh, "transfer", sizes), encode_program(plan, mesh, "transfer", sizes)]
    return found


def _matching(plan: PlannedRun, mesh: Mesh, few: int, many: int, wide: int) -> Program:
    """A pair of dictionaries on each device, or several."""
    together = match.side_by_side(plan.platform)
    block = mesh.devices.size * together
    rows = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(AXES)))
        for shape in ((block, few, wide), (block, many, wide), (block, many))
    ]
    given = (mesh, together, match.CANDIDATES, True, *rows)
    size = f"{block} pairs of {few} and {many} rows of {wide}"
    return Program("transfer: matching", size, match.best_rows, given, (), 2.0 * block * few * many * wide)


def text_program(plan: PlannedRun, mesh: Mesh, stage: str, sizes: Sequence[DictionaryConfig]) -> Program:
    """The model on ``batch_tokens`` of a ``stage``, with the sites of dictionaries of these ``sizes`` captured."""
    batch, model = plan.configs.named(stage).batch_tokens, plan.model
    length = round_length(min(plan.configs[CorpusConfig].context, model.context))
    rows = rows_per_batch(batch, length, mesh.shape["data"])
    sites = tuple(dict.fromkeys(Site.parse(one.site) for one in sizes))
    ids_BxT, lengths_B = by_row(mesh, (rows, round_length(length)), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    given = (model, sites, False, abstract_params(model, mesh, plan.dtype), ids_BxT, lengths_B, ())
    flops = pass_flops(model, rows * length, length, max(site.layer for site in sites) + 1)
    return Program(f"{stage}: text", f"{rows} x {length} tokens", forward, given, (), flops)


def encode_program(plan: PlannedRun, mesh: Mesh, stage: str, sizes: Sequence[DictionaryConfig]) -> Program:
    """The features of the widest dictionary on ``batch_tokens`` of a ``stage``; every one of its devices has it all."""
    batch, used = plan.configs.named(stage).batch_tokens, max(sizes, key=lambda size: size.n_features)
    x_BxD = whole(mesh, (batch, used.d_in), jnp.float32)
    encode = (abstract_dictionary(used, plan.configs[TrainConfig], mesh), x_BxD)
    size, flops = f"{batch} tokens x {used.n_features} features", 2.0 * batch * used.d_in * used.n_features
    kept = abstract_params(plan.model, mesh, plan.dtype)
    return Program(f"{stage}: encode", size, activity.encode_tokens, encode, kept, flops)
