"""The large programs of the stage ``track``, with shapes in place of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.costs.cost import PlannedRun
from saejax.costs.passes import head_flops, pass_flops
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, placed, whole
from saejax.dictionaries import DictionaryConfig
from saejax.interventions.split_model import active_features
from saejax.matching.track import tested
from saejax.matching.track.cost import counted, planned_layers, planned_texts
from saejax.matching.track.run import LENS_TOP
from saejax.models.config import RunRules
from saejax.models.language_model import forward
from saejax.models.lengths import round_length
from saejax.models.lens import chunk_size, read_positions
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.settings import ModelConfig, TrainConfig
from saejax.stages.track import TrackConfig


def track_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """For the longest text: the model and the lens at all layers, its features, and steps without some of them."""
    config = plan.configs[TrackConfig]
    if not (config.prompt or config.prompts) or not config.dictionaries:
        return []
    texts, layers = planned_texts(config), planned_layers(plan)
    length = min(max(counted(prompt, *steps) for prompt, steps in texts), plan.model.context)
    step = min(max(counted(step) for _, steps in texts for step in steps), length)
    used = max(plan.dictionaries(config.dictionaries), key=lambda one: one.n_features)
    middle = (config.test_layers or (layers[len(layers) // 2],))[0]
    site, target = (name and str(Site(Site.parse(name).kind, middle)) for name in (used.site, used.target))
    used = dataclasses.replace(used, site=site, target=target)
    shapes = _Shapes(plan, mesh, used, length)
    return [shapes.forward(layers), shapes.encode(), shapes.lens(), shapes.rows(step)]


class _Shapes:
    """Programs on one text of so many tokens."""

    def __init__(self, plan: PlannedRun, mesh: Mesh, used: DictionaryConfig, length: int):
        self._plan, self._mesh, self._used, self._length = plan, mesh, used, length
        self._params = abstract_params(plan.model, mesh, plan.dtype)
        self._dictionary = abstract_dictionary(used, plan.configs[TrainConfig], mesh)
        self._size = f"{length} tokens"

    def forward(self, layers: list[int]) -> Program:
        """The sites of all dictionaries together."""
        model, tokens = self._plan.model, round_length(self._length)
        sites = tuple(Site(Site.parse(self._used.site).kind, layer) for layer in layers)
        ids, lengths = by_row(self._mesh, (1, tokens), jnp.int32), by_row(self._mesh, (1,), jnp.int32)
        given = (model, sites, False, self._params, ids, lengths, ())
        flops = pass_flops(model, tokens, tokens, max(layers) + 1)
        return Program("track: model", self._size, forward, given, (), flops)

    def encode(self) -> Program:
        """All features of a layer."""
        x = whole(self._mesh, (1, self._length, self._used.d_in), self._plan.dtype)
        given = (self._dictionary, x, whole(self._mesh, (1, self._length), bool))
        flops = 2.0 * self._length * self._used.d_in * self._used.n_features
        return Program("track: encode", self._size, active_features, given, self._params, flops)

    def lens(self) -> Program:
        """The lens and its control, of some positions."""
        model = self._plan.model
        layers, width, positions = model.n_layers, model.d_model, chunk_size(self._length)
        x_LxNxD = whole(self._mesh, (layers, positions, width), self._plan.dtype)
        rotation, answers = jax.ShapeDtypeStruct((width, width), jnp.float32), np.zeros(1, np.int32)
        given = (model, min(LENS_TOP, model.vocab), self._params, x_LxNxD, rotation, answers)
        flops = (2 * layers + 1) * head_flops(model, positions)
        return Program("track: lens", f"{layers} layers x {positions} positions", read_positions, given, (), flops)

    def rows(self, tokens: int) -> Program:
        """The longest step without sets of features, as many as can be drawn beside those that are chosen."""
        plan, config, used = self._plan, self._plan.configs[TrackConfig], self._used
        reads, writes = Site.parse(used.site), Site.parse(used.target or used.site)
        point = SplitPoint(plan.model, writes, reads, self._mesh, RunRules(remat=plan.configs[ModelConfig].remat))
        value = whole(self._mesh, (1, round_length(self._length), plan.model.d_model), plan.dtype)
        past = placed(jax.eval_shape(point.run_suffix_with_kv, self._params, value, value)[1], self._mesh)
        drawn = min(config.step_features * (1 + config.matches), used.n_features)
        window, pool = tested.filled(max(tokens - 1, 1), drawn)
        rows = tested.rows_at_once(plan.platform, self._mesh.shape["data"])
        sets = np.zeros((window, pool), np.float32), np.zeros(pool, int), np.zeros((rows, pool), bool)
        given = (
            point,
            self._params,
            self._dictionary,
            value,
            value,
            past,
            *sets,
            np.zeros(window, np.int32),
            np.int32(0),
        )
        layers = plan.model.n_layers - reads.layer - 1
        flops = pass_flops(plan.model, rows * window, self._length, layers) + head_flops(plan.model, rows * window)
        return Program("track: rows", f"{rows} x {window} tokens", tested.run_rows, given, (), flops)
