"""What one member of a stack minimises on one batch.

    loss = squared errors of its reconstructions    (whitened if asked for)
         + penalty of its kind, and its further terms
         + auxk * AuxK + decorrelation * decorrelation + alignment * alignment

The formulas are in ``dictionaries.losses`` and ``dictionaries.kinds``; here they are put together.
"""

import dataclasses

import jax
import jax.numpy as jnp

from saejax.dictionaries import Dictionary, DictionaryConfig, losses
from saejax.dictionaries.kinds.base import Arrays, EncodedBatch
from saejax.dictionaries.sparse_products import Encoder, SparseCode, explain
from saejax.dictionaries.sparsity import row
from saejax.settings import TrainConfig
from saejax.training.members import Hyper
from saejax.training.updates import penalty_share


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a stack's members.

    Attributes:
      config: how to train.
      dictionary: what the members have in common; its ``k`` is the largest of theirs.
      steps: of the whole run.
      form: of the products, "dense", or "rows" for a plain TopK; see ``sparse_products``.
      all_columns: of AuxK's products; see ``losses.auxk``.
    """

    config: TrainConfig
    dictionary: DictionaryConfig
    steps: int
    form: str = "dense"
    all_columns: bool = False

    def __call__(
        self,
        params: Arrays,
        x_BxD: jax.Array,
        y_BxD: jax.Array,
        hyper: Hyper,
        step: jax.Array,
        dead_F: jax.Array,
        most_dead: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Arrays, jax.Array, jax.Array]]:
        """The loss of one member.

        Args:
          params: its arrays, as in ``parameter_table``.
          x_BxD, y_BxD: scaled inputs and targets.
          hyper: its own settings, scalars.
          step: steps done.
          dead_F: True for features that have been silent for too long.
          most_dead: the largest number of them that a member computed beside this one has; None: this one's.

        Returns:
          The loss, and (metrics, whether each feature fired on any token, the smallest activation that was kept).
        """
        config, member = self.config, Dictionary(self.dictionary, self.config.matmul, **params)
        kind, settings = member.kind, config.of_kind(member.kind.name)
        most_dead = jnp.sum(dead_F) if most_dead is None else most_dead
        pre_BxF, pre_for_auxk_BxF, f, residuals, smallest = self._explain(member, x_BxD, y_BxD, hyper, most_dead > 0)
        if isinstance(f, SparseCode):
            f_BxF, firings_F = f.dense(), f.firings()
        else:
            # In floats, because XLA:CPU vectorises no sums of integers; exact up to 2^24 tokens.
            f_BxF, firings_F = f, jnp.sum(member.fires(f).astype(jnp.float32), axis=0)
        errors = [losses.squared_size(error_BxD, hyper.metric_DxD, config.matmul) for error_BxD in residuals]
        error_BxD = residuals[-1]

        batch = EncodedBatch(member, x_BxD, y_BxD, pre_BxF, f_BxF, dead_F, hyper.metric_DxD, hyper.own, settings)
        parts = dict(error=sum(errors[1:], errors[0]))
        penalty = kind.penalty(batch)
        if penalty is not None:
            parts["sparsity"] = penalty * penalty_share(config, self.steps)(step)
        parts |= kind.losses(batch)
        if config.auxk:
            k = config.auxk_features or max(self.dictionary.d_in // 2, 1)
            fixed = error_BxD, k, config.matmul, hyper.metric_DxD, most_dead, self.all_columns
            aux = losses.auxk(pre_for_auxk_BxF, dead_F, params["W_dec_FxD"], *fixed)
            parts["auxk"] = config.auxk * aux
        if config.decorrelation:
            parts["decorrelation"] = config.decorrelation * losses.decorrelation(f_BxF)
        if config.alignment:
            parts["alignment"] = config.alignment * losses.alignment(params["W_enc_DxF"], params["W_dec_FxD"])
        loss = sum(parts.values(), jnp.zeros((), y_BxD.dtype))

        metrics = parts | dict(
            loss=loss,
            mse=losses.squared_size(error_BxD),
            l0=jnp.sum(firings_F) / x_BxD.shape[0],
            explained_variance=losses.explained_variance(y_BxD, error_BxD),
        )
        return loss, (metrics, firings_F > 0, smallest)

    def error(self, params: Arrays, x_BxD: jax.Array, y_BxD: jax.Array, hyper: Hyper) -> jax.Array:
        """What one member leaves of targets ``y_BxD`` given inputs ``x_BxD``, features chosen as in training."""
        member = Dictionary(self.dictionary, self.config.matmul, **params)
        return self._explain(member, x_BxD, y_BxD, hyper)[3][-1]

    def _explain(
        self,
        member: Dictionary,
        x_BxD: jax.Array,
        y_BxD: jax.Array,
        hyper: Hyper,
        any_dead: jax.Array | bool = True,
    ) -> tuple[jax.Array, jax.Array, jax.Array | SparseCode, list[jax.Array], jax.Array]:
        """Encode and reconstruct as in training.

        Returns:
          Pre-activations, for the kind's losses and for AuxK; activations; the residual of each reconstruction; the
          smallest activation that was kept.
        """
        arrays, kind = member.arrays, member.kind
        if self.form != "dense":
            centre_D = arrays["b_dec_D"] if self.dictionary.centred else jnp.zeros_like(arrays["b_dec_D"])
            encoder = Encoder(centre_D, arrays["W_enc_DxF"], arrays["b_enc_F"])
            rest = hyper.own["k"], self.dictionary.k, self.config.matmul, any_dead
            explained = explain(x_BxD, member.without_bias(y_BxD, x_BxD), encoder, arrays["W_dec_FxD"], *rest)
            smallest = jnp.zeros((), x_BxD.dtype)
            return explained.pre_BxF, explained.pre_for_auxk_BxF, explained.code, [explained.residual_BxD], smallest
        projected_BxF = member.pre_activations(x_BxD)
        pre_BxF, settings = projected_BxF + row(member.b_enc_F[...], 2), self.config.of_kind(self.dictionary.kind)
        f_BxF, smallest = kind.encode_in_training(member, pre_BxF, projected_BxF, hyper.own, settings)
        residuals = [y_BxD - y_hat_BxD for y_hat_BxD in kind.reconstructions(member, f_BxF, x_BxD)]
        return pre_BxF, pre_BxF, f_BxF, residuals, smallest
