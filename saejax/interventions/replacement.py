"""Replacements of a feature's activation when the feature is ablated.

- ``zero``: zero.
- ``mean``: its mean over the positions of some prompts, at every editable position.
- ``random``: where it fires, its activation at another position at which it fires, drawn from the tested prompts of the
  same clean run; a feature that fires at one position only keeps its activation there.
- ``counterpart``: its activation at the same position of the prompt's counterpart; 0 where that is an attention sink.

The replacement of a feature does not depend on which others are ablated with it, so the change of a set is the sum of
its features' changes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

WORDS = dict(
    zero="its activation is set to zero",
    mean="its activation is set, at every position, to its mean over the train prompts",
    random="where it fires, its activation is replaced by that at another position at which it fires, drawn at random",
    counterpart="its activation is replaced by that at the same position of the prompt's counterpart",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationReplacement:
    """The source of the activations that replace ablated ones.

    Attributes:
      kind: one of the module docstring's (static).
      mean_F: for ``mean``, of every feature.
      seed: for ``random``, of the draws, an integer array [].
    """

    kind: str = dataclasses.field(default="zero", metadata=dict(static=True))
    mean_F: jax.Array | None = None
    seed: jax.Array | None = None

    def of_run(self, number: int) -> "ActivationReplacement":
        """Return the replacement for one of several clean runs, each with independent draws."""
        if self.seed is None or not number:
            return self
        seed = np.random.SeedSequence([int(self.seed), number]).generate_state(1)[0]
        return dataclasses.replace(self, seed=np.uint32(seed))

    def changes(self, f_PxTxF: jax.Array, other_PxTxF: jax.Array, domain_PxT: jax.Array) -> jax.Array:
        """Return where an activation differs from its replacement, bool.

        Args:
          f_PxTxF: all features of some prompts, 0 where they are not editable.
          other_PxTxF: those of the prompts' counterparts.
          domain_PxT: True at editable positions.
        """
        if self.kind in ("mean", "counterpart"):
            replacement = self._means(f_PxTxF) if self.kind == "mean" else other_PxTxF
            return domain_PxT[:, :, None] & (f_PxTxF != replacement)
        return f_PxTxF != 0

    def removed(
        self,
        f_BxTxK: jax.Array,
        other_BxTxK: jax.Array,
        domain_BxT: jax.Array,
        features_K: jax.Array,
        prompts: jax.Array,
    ) -> jax.Array:
        """Return by how much the activations of K features fall, [B, T, K].

        Args:
          f_BxTxK: as for ``changes``, of all prompts of a clean run.
          other_BxTxK: as for ``changes``, likewise.
          domain_BxT: as for ``changes``, likewise.
          features_K: the features.
          prompts: number of the B rows that are prompts; the others are copies.
        """
        if self.kind == "zero":
            return f_BxTxK
        if self.kind == "random":
            return f_BxTxK - self._drawn(f_BxTxK, features_K, prompts)
        replacement = self._means(f_BxTxK, features_K) if self.kind == "mean" else other_BxTxK
        return jnp.where(domain_BxT[:, :, None], f_BxTxK - replacement, 0.0)  # not at sinks

    def _means(self, f_BxTxK: jax.Array, features_K: jax.Array | None = None) -> jax.Array:
        assert self.mean_F is not None
        mean_K = self.mean_F if features_K is None else self.mean_F[features_K]
        return mean_K.astype(f_BxTxK.dtype)[None, None, :]

    def _drawn(self, f_BxTxK: jax.Array, features_K: jax.Array, prompts: jax.Array) -> jax.Array:
        """Return where a feature fires its activation at another such position, elsewhere its activation."""
        assert self.seed is not None
        key = jax.random.key(self.seed)
        shape = f_BxTxK.shape
        f_NxK = f_BxTxK.reshape(-1, shape[-1])
        is_prompt_N = jnp.arange(len(f_NxK)) < prompts * shape[1]
        fires_NxK = (f_NxK != 0) & is_prompt_N[:, None]
        place_NxK = jnp.argsort(~fires_NxK, axis=0, stable=True)  # the firing positions come first, in their order
        rank_NxK = jnp.cumsum(fires_NxK, axis=0) - 1
        others_1xK = fires_NxK.sum(axis=0, keepdims=True) - 1
        # Each feature has its own key: its draws are the same whatever features it is gathered with.
        unit_NxK = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(key, k), (len(f_NxK),)), out_axes=1)(
            features_K
        )
        drawn_NxK = jnp.minimum((unit_NxK * others_1xK).astype(jnp.int32), jnp.maximum(others_1xK - 1, 0))
        drawn_NxK = jnp.where(drawn_NxK >= rank_NxK, drawn_NxK + 1, drawn_NxK)  # any position but this one
        resampled_NxK = jnp.take_along_axis(f_NxK, jnp.take_along_axis(place_NxK, drawn_NxK, axis=0), axis=0)
        return jnp.where(fires_NxK & (others_1xK > 0), resampled_NxK, f_NxK).reshape(shape)


ZERO = ActivationReplacement()


def removed_on_average(f_BxTxF: jax.Array, fires_F: jax.Array, sum_F: jax.Array) -> jax.Array:
    """Return by how much activations fall, mean over the draws of ``random``, [B, T, F].

    Args:
      f_BxTxF: the activations, 0 outside the domain.
      fires_F: at how many positions of the clean run each feature is not 0.
      sum_F: the sum of its activations there.
    """
    others_1x1xF = fires_F[None, None, :] - 1
    mean_BxTxF = (sum_F[None, None, :] - f_BxTxF) / jnp.maximum(others_1x1xF, 1)
    return jnp.where((f_BxTxF != 0) & (others_1x1xF > 0), f_BxTxF - mean_BxTxF, 0.0)
