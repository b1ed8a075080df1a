"""The programs of the stage ``attribute``, with shapes in place of arrays: those of its longest prompt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.attribution.checks import circuit_runs
from saejax.attribution.heads import passes
from saejax.attribution.local import active, replacement
from saejax.attribution.local.frozen import FrozenModel
from saejax.attribution.local.replacement import padded
from saejax.attribution.planned import planned_graphs
from saejax.attribution.requests import unit_name
from saejax.attribution.trace import backward, rows
from saejax.attribution.trace.memory import GraphSize, bank_sizes, heads_block
from saejax.attribution.trace.sources import WIDTH, SourceBank
from saejax.costs.passes import pass_flops
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_params, whole
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.parallel.mesh import fitting_sharding
from saejax.settings import GraphConfig


def attribute_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """A layer, its transcoder, the rows of a graph, the heads of its edges, and a part of it run alone.

    Raises:
      UserError: prompts or transcoders are not what the stage takes.
    """
    planned = planned_graphs(plan) if unit_name(plan.configs[GraphConfig]) else None
    if planned is None:
        return []
    shapes, layers = _Shapes(plan, mesh, planned.size, planned.longest), plan.model.n_layers
    passes = layers * len(planned.lengths)  # a layer of each prompt
    batches = planned.rows / shapes.targets
    found = [(shapes.layer(), passes), (shapes.transcoder(), passes), (shapes.rows(), batches)]
    if planned.size.heads:
        found += [(shapes.heads_up(), batches * layers), (shapes.heads_down(), batches * layers)]
    if planned.size.checked:
        found += [(shapes.circuits(), passes * planned.size.together / shapes.parts)]
    return [dataclasses.replace(program, runs=runs) for program, runs in found]


class _Shapes:
    """The stage's programs with shapes in place of arrays."""

    def __init__(self, plan: PlannedRun, mesh: Mesh, size: GraphSize, tokens: int):
        self._mesh, self._size, self._tokens, self._length = mesh, size, tokens, padded(tokens)
        self._model, self._platform = plan.model, plan.platform
        self._frozen, self._params = FrozenModel(plan.model), abstract_params(plan.model, mesh, plan.dtype)
        layers, width = plan.model.n_layers, plan.model.d_model
        self._stream_LxTxD = self._whole(layers, self._length, width)
        self._skip_LxDxD = self._whole(layers, width, width) if size.transcoder.skip else None
        self._x_TxD, self._layer = self._whole(self._length, width), np.int32(0)
        self.targets = rows.CHUNKS * rows.chunk_size(self._platform, self._length, mesh)
        self.parts = min(max(active.AT_ONCE // (self._length * size.transcoder.n_features), 1), size.together)
        self._prompt = f"a prompt of {tokens:,} tokens"
        self._kept = (self._stream_LxTxD, self._stream_LxTxD, self._skip_LxDxD)  # the streams, and the errors

    def _whole(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return whole(self._mesh, shape, dtype)

    def _run_flops(self, length: int) -> float:
        """Of a layer."""
        return pass_flops(self._model, length, length, 1)

    def layer(self) -> Program:
        """A layer of the model."""
        arguments = (self._frozen, self._params, self._layer, self._x_TxD)
        kept = (self._kept, self._dictionary("float32"))
        flops = self._run_flops(self._length)
        return Program("attribute: layer", self._prompt, replacement.run_layer, arguments, kept, flops)

    def transcoder(self) -> Program:
        """A layer's transcoder, beside that of the next."""
        features, width = self._size.transcoder.n_features, self._model.d_model
        count = max(1, min(self._length, active.AT_ONCE // features))
        x_TxD = self._whole(count, width)
        arguments = (self._dictionary("float32"), x_TxD, x_TxD, self._whole(count, dtype=bool))
        kept = (self._params, self._kept, self._dictionary("float32"))
        flops = 4.0 * count * features * width
        return Program("attribute: transcoder", f"{count:,} tokens", active.explain, arguments, kept, flops)

    def rows(self) -> Program:
        """A batch of a graph's rows."""
        size, model, length = self._size, self._model, self._length
        count, chunks = rows.chunk_size(self._platform, length, self._mesh), rows.CHUNKS
        table, blocks = bank_sizes(size, self._tokens)
        bank = SourceBank(
            jax.ShapeDtypeStruct((table, model.d_model), jnp.float32, sharding=self._over((table, model.d_model), 1)),
            self._whole(blocks, WIDTH, dtype=jnp.int32),
            self._whole(blocks, dtype=jnp.int32),
        )
        vector, where = (chunks, count, model.d_model), (chunks, count)
        batch = backward.TargetBatch(
            self._by_target(vector, jnp.float32),
            self._by_target(where, jnp.int32),
            self._by_target(where, jnp.int32),
            np.full(chunks, model.n_layers, np.int32),
        )
        places = np.zeros(model.n_layers + 2, np.int32), np.zeros(model.n_layers + 1, np.int32)
        given = self._params, self._stream_LxTxD, self._skip_LxDxD, bank, *places, batch
        flops = rows.row_flops(model, np.full(count * chunks, model.n_layers), length)
        flops += 2.0 * count * chunks * blocks * WIDTH * model.d_model
        return Program(
            "attribute: rows",
            f"{count * chunks:,} targets, {table:,} directions",
            backward.contributions,
            (self._frozen, self._mesh, *given),
            self._stream_LxTxD,
            flops,
        )

    def heads_up(self) -> Program:
        """Sources through a layer."""
        count, width = heads_block(self._platform, self._length), self._model.d_model
        own = self._whole(count, width), self._whole(count, dtype=jnp.int32), self._whole(count, self._length, width)
        arguments = (self._frozen, self._params, self._layer, self._stream_LxTxD, self._skip_LxDxD, *own)
        values = (self._model.n_layers, self._model.n_kv_heads, self._length, self._model.d_head, count)
        kept = (self._stream_LxTxD, self._whole(*values))
        flops = count * self._run_flops(self._length)
        return Program("attribute: heads, up", f"{count} sources", passes.carry_up, arguments, kept, flops)

    def heads_down(self) -> Program:
        """Targets through a layer."""
        count, width = heads_block(self._platform, self._length), self._model.d_model
        own = self._whole(count, width), self._whole(count, width), self._whole(count, dtype=jnp.int32)
        cotangent_RxTxD = self._whole(count, self._length, width)
        fixed = self._params, self._layer, self._stream_LxTxD, self._skip_LxDxD
        values = (self._model.n_layers, self._model.n_kv_heads, self._length, self._model.d_head, count)
        return Program(
            "attribute: heads, down",
            f"{count} targets",
            passes.carry_down,
            (self._frozen, *fixed, *own, cotangent_RxTxD),
            (self._stream_LxTxD, self._whole(*values)),
            count * self._run_flops(self._length),
        )

    def circuits(self) -> Program:
        """Parts of the graph through a layer."""
        size, length, width = self._size, self._length, self._model.d_model
        features, count = size.transcoder.n_features, self.parts
        some = padded(min(int(size.active * length), features * length))
        of_active = self._whole(some, dtype=jnp.int32)
        x_CxTxD = self._whole(count, length, width)
        kept = self._whole(count, some, dtype=bool), self._whole(count, length, dtype=bool)
        given = x_CxTxD, self._dictionary("float32"), of_active, of_active, *kept, None
        below = (x_CxTxD, x_CxTxD) if size.cross_layer else None
        arguments = (self._frozen, self._params, self._layer, *given, (np.int32(1), np.int32(self._tokens)), below)
        return Program(
            "attribute: circuits",
            f"{count} parts of a graph",
            circuit_runs.run_layer,
            arguments,
            (self._kept, self._dictionary("float32")),
            count * (self._run_flops(length) + 6.0 * length * features * width),
        )

    def _dictionary(self, dtype: str) -> Dictionary:
        """A layer's transcoder, features split over ``model``."""
        config = self._size.transcoder
        plain = DictionaryConfig(
            kind="jumprelu" if config.kind == "gated" else config.kind,  # as ``LayerDictionaries.load`` gives it
            d_in=config.d_in,
            n_features=config.n_features,
            k=config.k,
            skip=config.skip,
            centred=False,
        )
        arrays = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(self._mesh, shape, *spec))
            for name, (shape, spec) in parameter_table(plain).items()
        }
        max_norm = jax.ShapeDtypeStruct((), "float32", sharding=fitting_sharding(self._mesh, ()))
        return Dictionary(plain, **arrays, max_norm=max_norm)

    def _over(self, shape: tuple[int, ...], dimension: int) -> jax.sharding.NamedSharding:
        """One dimension split over ``model``."""
        return fitting_sharding(self._mesh, shape, *("model" if i == dimension else None for i in range(len(shape))))

    def _by_target(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Of a batch's targets, split over ``data``."""
        where = fitting_sharding(self._mesh, shape, None, "data", *[None] * (len(shape) - 2))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
