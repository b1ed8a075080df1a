"""One training step of a stack as a pure, jit-compiled, sharded function of (state, batch).

The step of one member is written once (``_member_step``); a stack is that function over a leading axis
(``training.each_member``).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from saejax.dictionaries import Dictionary, DictionaryConfig, kinds, sparse_products
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.kinds.topk import is_plain_topk
from saejax.parallel.mesh import fitting_sharding, sharding
from saejax.settings import MOST_TOKENS, TrainConfig
from saejax.settings.kinds import KIND_SETTINGS
from saejax.training import resampling
from saejax.training.each_member import each_member, members_at_once
from saejax.training.members import Hyper, Member, SiteScale
from saejax.training.objective import Objective
from saejax.training.state import TrainState, finished, initial_state, placed_update, with_shardings
from saejax.training.updates import constrained, learning_rate, make_optimizer


class Trainer:
    """Makes the initial state and the step of a stack on one mesh.

    Args:
      dictionary: what the members have in common.
      members: who they are.
      mesh: the devices; its ``member`` axis must divide the members.
      steps: length of the whole run, for the schedules.
      scales: of each member.

    Raises:
      UserError: ``config.products`` is not for the mesh's devices.
    """

    def __init__(
        self,
        config: TrainConfig,
        dictionary: DictionaryConfig,
        members: Sequence[Member],
        mesh: Mesh,
        steps: int,
        scales: Sequence[SiteScale],
    ):
        self.config, self.dictionary, self.members, self.mesh = config, dictionary, list(members), mesh
        self.scales = list(scales)
        self._steps = steps
        form, shape = "dense", (config.matmul, dictionary.n_features, dictionary.k)
        if is_plain_topk(kinds.by_name(dictionary.kind)):
            form = sparse_products.choose_form(config.products, mesh, *shape)
        # Split features stay on their devices, and a TPU's vector units move no single columns.
        all_columns = mesh.shape["model"] > 1 or mesh.devices.flat[0].platform == "tpu"
        self._objective = Objective(config, dictionary, steps, form, all_columns)
        self._optimizer, self._rate = make_optimizer(config, dictionary.widths), learning_rate(config, steps)
        self.sites = list(dict.fromkeys((member.site, member.target) for member in members))  # of the batch, in order
        hyper = Hyper.of(members, scales, self.sites, config.state_dtype)
        self.abstract_hyper = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._by_member(array.shape)), hyper
        )
        self._host_hyper = hyper
        self._at_once = members_at_once(
            config.members_at_once,
            len(members),
            config.batch,
            dictionary.n_features,
            mesh.shape,
            mesh.devices.flat[0].platform,
        )
        by_member = "member" if len(self.sites) == len(members) else None
        self.batch_sharding = fitting_sharding(mesh, (len(self.sites), config.batch, 1), by_member, "data", None)
        self.abstract_state = with_shardings(jax.eval_shape(self._initial), dictionary, mesh, config.zero_optimizer)
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.compiled = jax.jit(self.pure_step, donate_argnums=0, out_shardings=(self.shardings, sharding(mesh)))

    def step(self, state: TrainState, batch: tuple[jax.Array, ...]) -> tuple[TrainState, Arrays]:
        """One step of all members.

        Args:
          state: donated.
          batch: inputs [S, B, D] of the sites in ``self.sites``, raw; and for transcoders their targets.

        Returns:
          The next state, and metrics [M].
        """
        return self.compiled(state, self.hyper, batch)

    @functools.cached_property
    def hyper(self) -> Hyper:
        """What the step reads of the members, on the devices."""
        return jax.tree.map(
            lambda array, abstract: jax.device_put(array, abstract.sharding), self._host_hyper, self.abstract_hyper
        )

    def _by_member(self, shape: Sequence[int]) -> NamedSharding:
        return fitting_sharding(self.mesh, shape, "member", *[None] * (len(shape) - 1))

    def initial_state(self) -> TrainState:
        """The state before the first step, sharded over the mesh."""
        return jax.jit(self._initial, out_shardings=self.shardings)()

    def finish(self, state: TrainState, index: int) -> Dictionary:
        """A member's trained dictionary, for raw activations."""
        arrays = {name: array[index] for name, array in state.params.items()}
        member, scale = self.members[index], self.scales[index]
        return finished(self.config, self.dictionary, member, scale, arrays, state.kept_M[index])

    def _initial(self) -> TrainState:
        return initial_state(self.config, self.dictionary, self.members, self.scales)

    def pure_step(self, state: TrainState, hyper: Hyper, raw: tuple[jax.Array, ...]) -> tuple[TrainState, Arrays]:
        """``step`` before it is compiled, for programs of many steps."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._step(state, hyper, raw)

    def _step(self, state: TrainState, hyper: Hyper, raw: tuple[jax.Array, ...]) -> tuple[TrainState, Arrays]:
        # Members at the same time take one branch, as sums over the mesh's other axes stand in it; else each its own.
        most_dead = []
        if self._at_once > 1 or self.mesh.shape["member"] > 1:
            most_dead = [jnp.max(jnp.sum(state.silent_MxF >= self.config.dead_tokens, axis=-1))]
        after, metrics = self._each_member(self._member_step, state, hyper, raw, *most_dead)
        if self.config.resample_every:
            now = resampling.due(self.config, self._steps, after.step_M[0])
            resample = functools.partial(self._each_member, self._resample, hyper=hyper, raw=raw)
            after, _ = lax.cond(now, resample, lambda state: (state, ()), after)
        return after, metrics

    def _each_member(
        self, apply: Any, state: TrainState, hyper: Hyper, raw: tuple[jax.Array, ...], *same: jax.Array
    ) -> tuple[TrainState, Any]:
        """``apply(state, hyper, inputs, targets, *same)``, both scaled, for each member; what comes of it."""
        raw = tuple(values_SxBxD.astype(self.config.state_dtype) for values_SxBxD in raw)
        count = len(same)

        def one(state: TrainState, own: Any, *shared: jax.Array) -> tuple[TrainState, Any]:
            (hyper, values), same, shared = own, shared[:count], shared[count:]
            if values is None:
                values = [lax.dynamic_index_in_dim(values_SxBxD, hyper.site, keepdims=False) for values_SxBxD in shared]
            x_BxD = values[0] * hyper.input_scale
            y_BxD = values[1] * hyper.output_scale if len(values) > 1 else x_BxD
            return apply(state, hyper, x_BxD, y_BxD, *same)

        if len(self.sites) == len(self.members):  # each member has its own values, on its own devices
            return each_member(one, state, (hyper, raw), same, self.mesh, self._at_once)
        return each_member(one, state, (hyper, None), (*same, *raw), self.mesh, self._at_once)

    def _resample(
        self, state: TrainState, hyper: Hyper, x_BxD: jax.Array, y_BxD: jax.Array
    ) -> tuple[TrainState, tuple[()]]:
        error_BxD = self._objective.error(state.params, x_BxD, y_BxD, hyper)
        # Features on any device pick tokens of all: JAX 0.11's compiler crashes where it is to find out how.
        batch = lax.with_sharding_constraint((x_BxD, y_BxD, error_BxD), sharding(self.mesh))
        return resampling.resampled(self.config, self.dictionary, state, hyper, *batch), ()

    def _member_step(
        self, state: TrainState, hyper: Hyper, x_BxD: jax.Array, y_BxD: jax.Array, most_dead: jax.Array | None = None
    ) -> tuple[TrainState, Arrays]:
        """The step of one member; the state's arrays have no member axis here. ``most_dead``: see ``Objective``."""
        config, params = self.config, self._placed(state.params)
        dead_F = state.silent_MxF >= config.dead_tokens
        gradient = jax.grad(self._objective, has_aux=True)
        grads, (metrics, fired_F, smallest) = gradient(params, x_BxD, y_BxD, hyper, state.step_M, dead_F, most_dead)
        state, told = self._moved(state, grads, fired_F, smallest, hyper.learning_rate, len(x_BxD))
        return state, metrics | told

    def _moved(
        self,
        state: TrainState,
        grads: Arrays,
        fired_F: jax.Array,
        smallest: jax.Array,
        learning_rate: jax.Array,
        tokens: int,
    ) -> tuple[TrainState, Arrays]:
        """The state of one member after its gradient of so many tokens, and what there is to tell of the update."""
        config, params, dtype = self.config, state.params, smallest.dtype
        dead_F = state.silent_MxF >= config.dead_tokens
        rate = learning_rate * self._rate(state.step_M).astype(dtype)
        grads, params = (self._placed(self._placed(arrays), over_data=True) for arrays in (grads, params))
        updates, optimizer = self._optimizer.update(grads, state.optimizer, params, learning_rate=rate)
        kind = kinds.by_name(self.dictionary.kind)
        moved = optax.apply_updates(params, updates)
        after = constrained(config, kind, moved, before=params, widths=self.dictionary.widths)
        after = self._placed(self._placed(after, over_data=True))
        longest = MOST_TOKENS - tokens  # the count stops there
        silent_F = jnp.where(fired_F, 0, jnp.minimum(state.silent_MxF, longest) + tokens)
        # A unit's fingerprint covers the setting only for kinds that declare that they read it.
        declared = "threshold_rate" in KIND_SETTINGS[self.dictionary.kind].reads
        threshold_rate = config.threshold_rate if declared else TrainConfig.threshold_rate
        mean = state.kept_M + threshold_rate * (smallest - state.kept_M)
        kept = jnp.where(state.step_M == 0, smallest, mean)
        norm = optax.tree.get(optimizer, "gradient_norm")
        told = dict(learning_rate=rate, gradient_norm=norm, dead=jnp.mean(dead_F.astype(jnp.float32)))
        return TrainState(after, optimizer, silent_F, kept, state.step_M + 1), told

    def _placed(self, arrays: Arrays, *, over_data: bool = False) -> Arrays:
        """With ``zero_optimizer`` a member's arrays split over ``data`` too, or not; else as they are."""
        if not self.config.zero_optimizer:
            return arrays
        return placed_update(arrays, self.dictionary, self.mesh, over_data=over_data)
