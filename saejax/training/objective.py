"""What one member of a stack minimises on one batch.

    loss = squared error                            (whitened if asked for)
         + penalty of its kind                      (L1, or a function of L0 for JumpReLU)
         + the gate's own error                     (gated)
         + dead_pre_activation * pull on dead features' pre-activations   (jumprelu)
         + auxk * AuxK + decorrelation * decorrelation

The formulas are in ``dictionaries.losses``; here they are put together. Top-k kinds have no penalty.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries import Dictionary, DictionaryConfig, losses, sparsity, straight_through
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.settings import TrainConfig
from saejax.training import schedules
from saejax.training.members import Hyper

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a stack's members.

    Attributes:
      config: how to train.
      dictionary: what the members have in common; its ``k`` is the largest of theirs.
      steps: of the whole run.
    """

    config: TrainConfig
    dictionary: DictionaryConfig
    steps: int

    def __call__(
        self,
        params: Arrays,
        x_BxD: jax.Array,
        y_BxD: jax.Array,
        hyper: Hyper,
        step: jax.Array,
        dead_F: jax.Array,
        any_dead: jax.Array | bool = True,
    ) -> tuple[jax.Array, tuple[Arrays, jax.Array, jax.Array]]:
        """The loss of one member.

        Args:
          params: its arrays, as in ``parameter_table``.
          x_BxD, y_BxD: scaled inputs and targets.
          hyper: its own settings, scalars.
          step: steps done.
          dead_F: True for features that have been silent for too long.
          any_dead: False if no member of the stack has any.

        Returns:
          The loss, and (metrics, whether each feature fired on any token, the smallest activation that was kept).
        """
        config, member = self.config, Dictionary(self.dictionary, self.config.matmul, **params)
        projected_BxF = member.pre_activations(x_BxD)
        pre_BxF = projected_BxF + row(member.b_enc_F[...], 2)
        f_BxF, smallest = self._activate(member, pre_BxF, projected_BxF, hyper)
        reconstructions = self._reconstructions(member, f_BxF, x_BxD)
        y_hat_BxD, W_dec_FxD = reconstructions[-1], params["W_dec_FxD"]

        errors = [
            losses.squared_error(y_BxD, each_BxD, hyper.metric_DxD, config.matmul) for each_BxD in reconstructions
        ]
        parts = dict(error=sum(errors[1:], errors[0]))
        penalty = self._penalty(member, f_BxF, pre_BxF, hyper)
        if penalty is not None:
            parts["sparsity"] = penalty * schedules.rising(config, self.steps, step)
        if self.dictionary.kind == "gated":
            parts["gate_error"] = self._gate_error(member, pre_BxF, x_BxD, y_BxD, hyper.metric_DxD)
        if config.dead_pre_activation and self.dictionary.kind == "jumprelu":
            pull = losses.dead_pre_activation(pre_BxF, params["threshold_F"], dead_F, W_dec_FxD)
            parts["dead_pre_activation"] = config.dead_pre_activation * pull
        if config.auxk:
            k = config.auxk_features or max(self.dictionary.d_in // 2, 1)
            error_BxD = y_BxD - y_hat_BxD
            aux = losses.auxk(pre_BxF, dead_F, W_dec_FxD, error_BxD, k, config.matmul, hyper.metric_DxD, any_dead)
            parts["auxk"] = config.auxk * aux
        if config.decorrelation:
            parts["decorrelation"] = config.decorrelation * losses.decorrelation(f_BxF)
        loss = sum(parts.values(), jnp.zeros((), y_BxD.dtype))

        # In floats, because XLA:CPU vectorises no sums of integers; exact up to 2^24 tokens.
        firings_F = jnp.sum(member.fires(f_BxF).astype(jnp.float32), axis=0)
        metrics = parts | dict(
            loss=loss,
            mse=losses.squared_error(y_BxD, y_hat_BxD),
            l0=jnp.sum(firings_F) / f_BxF.shape[0],
            explained_variance=losses.explained_variance(y_BxD, y_hat_BxD),
        )
        return loss, (metrics, firings_F > 0, smallest)

    def reconstruction(self, params: Arrays, x_BxD: jax.Array, hyper: Hyper) -> jax.Array:
        """What one member makes of inputs, features chosen as in training."""
        member = Dictionary(self.dictionary, self.config.matmul, **params)
        projected_BxF = member.pre_activations(x_BxD)
        f_BxF, _ = self._activate(member, projected_BxF + row(member.b_enc_F[...], 2), projected_BxF, hyper)
        return member.decode(f_BxF, x_BxD)

    def _activate(
        self, member: Dictionary, pre_BxF: jax.Array, projected_BxF: jax.Array, hyper: Hyper
    ) -> tuple[jax.Array, jax.Array]:
        """Activations as in training, and the smallest kept one (batchtopk and matryoshka; else 0)."""
        kind, none = self.dictionary.kind, jnp.zeros((), pre_BxF.dtype)
        if kind == "topk":
            return sparsity.topk(pre_BxF, hyper.k, self.dictionary.k), none
        if kind in ("batchtopk", "matryoshka"):
            return sparsity.batch_topk(pre_BxF, hyper.k)
        if kind == "jumprelu":
            return straight_through.jumprelu(pre_BxF, member.threshold_F[...], self.config.bandwidth), none
        if kind == "gated":
            return sparsity.gated(pre_BxF, member.magnitudes(projected_BxF)), none
        return (pre_BxF if kind == "linear" else sparsity.relu(pre_BxF)), none

    def _reconstructions(self, member: Dictionary, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """What must be like the targets: the reconstruction; for matryoshka those of the nested groups, ascending.

        The errors are summed over the groups (Bussmann et al., 2025).
        """
        if self.dictionary.kind != "matryoshka":
            return [member.decode(f_BxF, x_BxD)]
        W_dec_FxD, start = member.W_dec_FxD[...], 0
        nested, partial_BxD = [], row(member.b_dec_D[...], 2)
        if self.dictionary.skip:
            partial_BxD += matmul(x_BxD, member.W_skip_DxD[...], self.config.matmul)
        for stop in self.dictionary.groups:
            partial_BxD += matmul(f_BxF[:, start:stop], W_dec_FxD[start:stop], self.config.matmul)
            nested.append(partial_BxD)
            start = stop
        return nested

    def _penalty(self, member: Dictionary, f_BxF: jax.Array, pre_BxF: jax.Array, hyper: Hyper) -> jax.Array | None:
        kind, W_dec_FxD = self.dictionary.kind, member.W_dec_FxD[...]
        if kind in ("standard", "linear"):
            return hyper.l1 * losses.l1_norm_weighted(f_BxF, W_dec_FxD)
        if kind == "gated":  # on the gate, because the magnitudes should not shrink
            return hyper.l1 * losses.l1_norm_weighted(sparsity.relu(pre_BxF), W_dec_FxD)
        if kind != "jumprelu":
            return None
        if self.config.l0_penalty == "tanh":
            return hyper.l0_coefficient * losses.tanh_norm_weighted(f_BxF, W_dec_FxD)
        active_BxF = straight_through.step(pre_BxF, member.threshold_F[...], self.config.bandwidth)
        l0 = jnp.mean(jnp.sum(active_BxF, axis=-1))
        if self.config.l0_penalty == "target":
            l0 = jnp.square(l0 / hyper.target_l0 - 1)
        return hyper.l0_coefficient * l0

    def _gate_error(
        self,
        member: Dictionary,
        pre_BxF: jax.Array,
        x_BxD: jax.Array,
        y_BxD: jax.Array,
        metric_DxD: jax.Array | None,
    ) -> jax.Array:
        """Squared error of what the open gates alone would rebuild; the decoder is a constant here."""
        W_dec_FxD, b_dec_D = (lax.stop_gradient(member.arrays[name]) for name in ("W_dec_FxD", "b_dec_D"))
        y_hat_BxD = matmul(sparsity.relu(pre_BxF), W_dec_FxD, self.config.matmul) + row(b_dec_D, 2)
        if self.dictionary.skip:
            y_hat_BxD += matmul(x_BxD, lax.stop_gradient(member.W_skip_DxD[...]), self.config.matmul)
        return losses.squared_error(y_BxD, y_hat_BxD, metric_DxD, self.config.matmul)
