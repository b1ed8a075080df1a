"""Training a cross-layer transcoder: a stack with a member for every layer, whose members minimise one loss.

    loss = sum over layers of (squared error of what is written to it + penalty of its kind, and its further terms)

All that a stack has is the same: inputs, scales, seeds, metrics of each member. At the start the members are those of a
stack of transcoders, with nothing written to later layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, kinds, losses, rescale
from saejax.dictionaries.cross_layer import FORM, KINDS, LayerEncoder, joined_lengths, written
from saejax.dictionaries.kinds.base import Arrays, EncodedBatch
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError
from saejax.parallel.collectives import to_host
from saejax.settings import TrainConfig
from saejax.training.members import Hyper, Member
from saejax.training.state import TrainState
from saejax.training.step import Trainer
from saejax.training.updates import penalty_share

_UNUSED = dict(auxk=0.0, decorrelation=0.0, alignment=0.0, whiten_error=0.0, resample_every=0, init_from="")
_LAYER = ("W_enc_DxF", "b_enc_F")  # arrays that encode, beside those of a kind


def check_layers(config: TrainConfig, kind: str, stack: Sequence[Member], axes: Mapping[str, int]) -> None:
    """A ``UserError`` unless these members make a cross-layer transcoder, and a mesh of these axes can train it."""
    if kind not in KINDS:
        raise UserError(f"--train.kinds={kind}: a {FORM} is one of {', '.join(KINDS)}, which circuit-tracer can read")
    sites, wanted = [member.site for member in stack], [f"mlp_in.{layer}" for layer in range(len(stack))]
    if sites != wanted:
        told = f"--train.sites=mlp_in.0-{max(len({*sites}) - 1, 1)}, and one value of each setting"
        raise UserError(f"a {FORM} has one encoder of every layer from 0, in order: give {told}")
    if len(stack) < 2:
        raise UserError(f"a {FORM} of one layer is a transcoder: use --train.form=transcoder, or name more sites")
    used = [f"--train.{name}={getattr(config, name)}" for name, off in _UNUSED.items() if getattr(config, name) != off]
    if used:
        raise UserError(f"{', '.join(used)}: not for a {FORM}: leave it out")
    if axes["member"] > 1:
        raise UserError(f"--mesh.member={axes['member']}: the layers of a {FORM} are one dictionary: use --mesh.model")


@dataclasses.dataclass(frozen=True)
class CrossLayerObjective:
    """The loss of all layers together.

    Attributes:
      config: how to train.
      dictionary: what the layers have in common.
      steps: of the whole run.
      mesh: the devices.
    """

    config: TrainConfig
    dictionary: DictionaryConfig
    steps: int
    mesh: Mesh

    def __call__(
        self,
        layers: Sequence[Arrays],
        x_LxBxD: jax.Array,
        y_LxBxD: jax.Array,
        hyper: Hyper,
        step: jax.Array,
        dead_LxF: jax.Array,
    ) -> tuple[jax.Array, tuple[Arrays, jax.Array, jax.Array]]:
        """The loss on one batch.

        Args:
          layers: the arrays of each, "W_dec_FxD" as wide as all that it writes.
          x_LxBxD, y_LxBxD: scaled inputs and targets.
          hyper: settings of the layers.
          step: steps done.
          dead_LxF: True for features that have been silent for too long.

        Returns:
          The loss, and (metrics [L], whether each feature fired on any token, the smallest activation each layer kept).
        """
        config, kind = self.config, kinds.by_name(self.dictionary.kind)
        settings, decoders = config.of_kind(kind.name), [arrays["W_dec_FxD"] for arrays in layers]

        def encode(layer: Any) -> tuple[jax.Array, jax.Array, Arrays, jax.Array]:
            arrays, norms_F, x_BxD, values, dead_F = layer
            encoder = LayerEncoder(self.dictionary, config.matmul, arrays, norms_F)
            projected_BxF = matmul(x_BxD, arrays["W_enc_DxF"], config.matmul)
            pre_BxF = projected_BxF + row(arrays["b_enc_F"], 2)
            f_BxF, smallest = kind.encode_in_training(encoder, pre_BxF, projected_BxF, values, settings)
            batch = EncodedBatch(encoder, x_BxD, x_BxD, pre_BxF, f_BxF, dead_F, None, values, settings)
            penalty, parts = kind.penalty(batch), kind.losses(batch)
            parts |= {} if penalty is None else dict(sparsity=penalty * penalty_share(config, self.steps)(step))
            return f_BxF, smallest, parts, jnp.sum((f_BxF > 0).astype(jnp.float32), axis=0)

        names = (*_LAYER, *kind.vectors)
        stacked = {name: jnp.stack([arrays[name] for arrays in layers]) for name in names}
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        each = (lambda args: lax.map(encode, args)) if on_cpu else jax.vmap(encode)
        f_LxBxF, smallest_L, parts, firings_LxF = each(
            (stacked, joined_lengths(decoders), x_LxBxD, hyper.own, dead_LxF)
        )

        bias_LxD = jnp.stack([arrays["b_dec_D"] for arrays in layers])
        error_LxBxD = y_LxBxD - written(f_LxBxF, decoders, self.mesh, config.matmul) - bias_LxD[:, None]
        mse_L = jax.vmap(losses.squared_size)(error_LxBxD)
        parts = dict(error=mse_L) | parts
        loss_L = sum(parts.values(), jnp.zeros_like(mse_L))
        metrics = parts | dict(
            loss=loss_L,
            mse=mse_L,
            l0=jnp.sum(firings_LxF, axis=1) / x_LxBxD.shape[1],
            explained_variance=jax.vmap(losses.explained_variance)(y_LxBxD, error_LxBxD),
        )
        return jnp.sum(loss_L), (metrics, firings_LxF > 0, smallest_L)


class CrossLayerTrainer(Trainer):
    """The ``Trainer`` of a cross-layer transcoder; arrays and optimizer of its state are tuples over layers.

    Every layer's gradient is clipped by itself, as a member's of a stack.
    """

    def _initial(self) -> TrainState:
        """That of a stack of transcoders, its decoders filled up with zeros for what is written to later layers."""
        stacked, layers = super()._initial(), len(self.members)

        def own(layer: int) -> Arrays:
            arrays = {name: array[layer] for name, array in stacked.params.items()}
            above = (layers - 1 - layer) * self.dictionary.d_in
            return arrays | dict(W_dec_FxD=jnp.pad(arrays["W_dec_FxD"], ((0, 0), (0, above))))

        params = tuple(map(own, range(layers)))
        return dataclasses.replace(stacked, params=params, optimizer=tuple(map(self._optimizer.init, params)))

    def pure_step(self, state: TrainState, hyper: Hyper, raw: tuple[jax.Array, ...]) -> tuple[TrainState, Arrays]:
        """``step`` before it is compiled, for programs of many steps."""
        x_LxBxD, y_LxBxD = (values_LxBxD.astype(self.config.state_dtype) for values_LxBxD in raw)
        x_LxBxD, y_LxBxD = x_LxBxD * hyper.input_scale[:, None, None], y_LxBxD * hyper.output_scale[:, None, None]
        objective = CrossLayerObjective(self.config, self.dictionary, self._steps, self.mesh)
        dead_LxF = state.silent_MxF >= self.config.dead_tokens
        gradient = jax.grad(objective, has_aux=True)
        grads, (metrics, fired_LxF, smallest_L) = gradient(
            state.params, x_LxBxD, y_LxBxD, hyper, state.step_M[0], dead_LxF
        )
        tokens = x_LxBxD.shape[1]
        moved = [
            self._moved(of_layer(state, layer), grads[layer], fired_LxF[layer], smallest_L[layer], rate, tokens)
            for layer, rate in enumerate(hyper.learning_rate)
        ]
        states, told = zip(*moved, strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *told)
        rest = {name: jnp.stack([getattr(s, name) for s in states]) for name in ("silent_MxF", "kept_M", "step_M")}
        after = TrainState(tuple(s.params for s in states), tuple(s.optimizer for s in states), **rest)
        return after, metrics | stacked

    def finish(self, state: TrainState, index: int) -> Dictionary:
        """A layer alone, for raw activations: what its features write to their own layer is the decoder."""
        config, arrays = self._raw(state, index)
        W_dec_FxD = arrays["W_dec_FxD"][:, : config.d_in]
        return Dictionary(config, self.config.matmul, **arrays | dict(W_dec_FxD=W_dec_FxD))

    def finished_layer(self, state: TrainState, layer: int) -> tuple[Dictionary, np.ndarray]:
        """``finish``, with arrays on the host, and what the features write to each layer from their own on, [F, X, D].

        All processes must ask together.
        """
        config, arrays = self._raw(state, layer)
        host = {name: to_host(array) for name, array in arrays.items()}
        writes_FxXxD = host["W_dec_FxD"].reshape(config.n_features, -1, config.d_in)
        own = {name: jnp.asarray(array) for name, array in (host | dict(W_dec_FxD=writes_FxXxD[:, 0])).items()}
        return Dictionary(config, self.config.matmul, **own), writes_FxXxD

    def _raw(self, state: TrainState, layer: int) -> tuple[DictionaryConfig, Arrays]:
        """A layer's arrays for raw activations, rows of the joined decoders of length 1, and what it is: a JumpReLU."""
        kind, own = kinds.by_name(self.dictionary.kind), of_layer(state, layer)
        arrays, scales = kind.finish(own.params, own.kept_M), self.scales
        arrays = rescale.fold_input_scaling(kind, arrays, scales[layer].input, scales[layer].output)
        # Each layer's outputs have their own scale, and activations that of the layer that they come from.
        factors = [scales[layer].output / scale.output for scale in scales[layer:]]
        factor_X = np.repeat(np.array(factors, self.config.state_dtype), self.dictionary.d_in)
        W_dec_FxX = arrays["W_dec_FxD"] * factor_X[None]
        arrays = rescale.unit_rows(kind, arrays | dict(W_dec_FxD=W_dec_FxX))
        member = self.members[layer]
        described = dataclasses.replace(
            self.dictionary,
            site=member.site,
            target=member.target,
            max_norm=scales[layer].max_norm,
            target_max_norm=scales[layer].target_max_norm,
            k=0,
        )
        if kind.jumprelu:
            described, arrays = dataclasses.replace(described, kind="jumprelu"), kind.as_jumprelu(arrays)
        return described, arrays


def of_layer(state: TrainState, layer: int) -> TrainState:
    """The state of one layer, as that of one member of a stack."""
    rest = {name: getattr(state, name)[layer] for name in ("silent_MxF", "kept_M", "step_M")}
    return TrainState(state.params[layer], state.optimizer[layer], **rest)
