"""What a user can do to a dictionary's features during a forward pass."""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.basis import Basis
from saejax.dictionaries.edits import FeatureEdit
from saejax.errors import UserError, one_of
from saejax.models.edits import Positions, Span, Values
from saejax.models.sites import KINDS, Site


class Editing(Basis):
    """Edits of features, as methods of every basis. Each gives an edit for ``lm(tokens, edits=[...])``.

    Features are indices, 0 <= i < n_features, none twice. The new activation g_i of each takes the place of its
    activation f_i; a transcoder's features are read at its site and changed at its target. Programs are compiled once
    for each number of features, whatever features and values.

    ``positions``:

    - "all";
    - "last": each prompt's last token, and in generation every new token as it is read;
    - (start, stop): counted from 0 in each text, new tokens included; a stop of None is the end;
    - "fires": of each feature, those at which it is active.

    Padding and attention sinks pass untouched, by all edits: the dictionary was not trained on sinks, so that its
    features mean nothing there.

    ``error``:

    - "keep": x' = x + sum_i (g_i - f_i) W_dec_i, so that what the dictionary does not explain stays;
    - "drop": x' = decode(f with g in it); where positions are "fires", at those at which any of the features does.

    All methods raise a ``UserError`` for features, positions and shapes that cannot be. A dictionary of another width
    than the site is found when a model runs.
    """

    def ablate(self, features: Sequence[int], positions: str | Span = "all", error: str = "keep") -> FeatureEdit:
        """g = 0."""
        return self._edit(features, 0.0, 0.0, positions, error)

    def set(
        self, features: Sequence[int], activations: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """g = the activations: a number, or one for each feature, [K], such as their means over some text."""
        return self._edit(features, 0.0, activations, positions, error)

    def scale(
        self, features: Sequence[int], factor: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """g = factor x f; the factor is a number, or one for each feature, [K]."""
        return self._edit(features, factor, 0.0, positions, error)

    def patch(
        self, features: Sequence[int], f_BxTxK: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """g = activations given for every position of the prompts, such as those of counterpart prompts.

        New tokens, in generation, have none and pass unchanged.

        Args:
          f_BxTxK: T is the prompts' length with padding; what stands at padding is without effect.
        """
        given = Values.for_prompts(f_BxTxK, len(features), "what is patched in")
        return self._edit(features, 0.0, given, positions, error)

    def steer(
        self, features: Sequence[int], amount: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """g = f + amount: adds amount x W_dec_i at every wanted position, whether the feature fires there or not.

        Args:
          amount: in units of activations, a number or one for each feature, [K]. Where decoder rows have unit norm it
            is the length of what is added.
        """
        return self._edit(features, 1.0, amount, positions, error)

    def redraw(
        self,
        features: Sequence[int],
        pools: Sequence[Any],
        length: int,
        seed: int = 789,
        texts: Sequence[int] | None = None,
    ) -> FeatureEdit:
        """g = where the feature fires, an activation drawn at random from a pool of its own; new tokens, too.

        The draw depends on seed, feature, text and place in the text alone, so that it is the same in every batch and
        with every method of generation.

        Args:
          pools: for each feature the activations, [N], that are drawn from, such as those where it fires on some text;
            a feature whose pool is empty stays as it is.
          length: places of a text with draws of their own, such as the model's context; later ones share one draw.
          seed: of the draws.
          texts: a number for each text that the edit is used on; those of one number are replaced alike. None: all are,
            however many.
        """
        features_K = self._indices(features)
        numbers, row_B = np.unique(np.zeros(1, int) if texts is None else texts, return_inverse=True)
        drawn_NxTxK = np.zeros((len(numbers), length, len(features_K)), np.float32)
        factor_K = np.ones(len(features_K), np.float32)
        for k, (feature, pool) in enumerate(zip(features_K.tolist(), pools, strict=True)):
            pool = np.asarray(pool, np.float32)
            if not np.isfinite(pool).all():
                raise UserError(f"the pool of feature {feature} holds NaN or infinity: expected finite activations")
            if len(pool):
                for drawn_TxK, number in zip(drawn_NxTxK, numbers.tolist(), strict=True):
                    own = [seed, feature] if texts is None else [seed, feature, number]
                    drawn_TxK[:, k] = np.random.default_rng(own).choice(pool, length)
                factor_K[k] = 0.0
        where = Positions.parse("fires", ("fires",))
        return self._made(features_K, factor_K, Values.for_positions(drawn_NxTxK[row_B]), where, None)

    def ablate_error(self, positions: str | Span = "all") -> FeatureEdit:
        """x' = decode(f): the dictionary's error term goes and all features stay."""
        return self._error_edit(Values.constant(0.0, self.config.d_in, "the error term"), positions)

    def patch_error(self, error_BxTxD: Any, positions: str | Span = "all") -> FeatureEdit:
        """x' = decode(f) + an error term given for every position of the prompts.

        Args:
          error_BxTxD: such as ``x - sae(x)`` of counterpart prompts; see ``patch``.
        """
        return self._error_edit(Values.for_prompts(error_BxTxD, self.config.d_in, "the error term"), positions)

    def resample(self, features: Sequence[int], x_BxTxD: Any, mask_BxT: Any, seed: int = 789) -> np.ndarray:
        """Activations to ``patch`` in: where a feature fires, its activation at another position at which it does.

        The position is drawn at random from all prompts; a feature that fires at one position only keeps its
        activation. Each feature has draws of its own, whatever others are named.

        Args:
          x_BxTxD: the values at the site that the dictionary reads.
          mask_BxT: True at real positions.
          seed: of the draws.

        Returns:
          [B, T, K] fp32.
        """
        features_K = self._indices(features)
        f_BxTxK = self.encode(jnp.asarray(x_BxTxD))[..., features_K]
        domain_BxT = np.asarray(mask_BxT) & np.asarray(self.is_not_sink(jnp.asarray(x_BxTxD)))
        fires_BxTxK = np.asarray(self.fires(f_BxTxK)) & domain_BxT[..., None]
        f_BxTxK = np.array(f_BxTxK)
        for k, feature in enumerate(features_K.tolist()):
            f_N = f_BxTxK[..., k][fires_BxTxK[..., k]]
            if len(f_N) > 1:
                drawn_N = np.random.default_rng([seed, feature]).integers(len(f_N) - 1, size=len(f_N))
                drawn_N += drawn_N >= np.arange(len(f_N))  # any but its own
                f_BxTxK[..., k][fires_BxTxK[..., k]] = f_N[drawn_N]
        return f_BxTxK

    def _edit(
        self, features: Sequence[int], factor: Any, offset: Any, positions: str | Span, error: str
    ) -> FeatureEdit:
        one_of(error, ("keep", "drop"), "error")
        dropped = Values.constant(0.0, self.config.d_in, "the error term") if error == "drop" else None
        where = Positions.parse(positions, ("all", "last", "fires"))
        return self._made(self._indices(features), factor, offset, where, dropped)

    def _error_edit(self, error: Values, positions: str | Span) -> FeatureEdit:
        return self._made(np.zeros(0, np.int32), 1.0, 0.0, Positions.parse(positions), error)

    def _made(
        self, features_K: np.ndarray, factor: Any, offset: Any, where: Positions, error: Values | None
    ) -> FeatureEdit:
        reads = Site.parse(self.config.site)
        site = Site.parse(self.config.target) if self.config.target else reads
        if reads.layer != site.layer or KINDS.index(reads.kind) > KINDS.index(site.kind):
            raise UserError(f"a dictionary from {reads} to {site} cannot be edited: expected a later site of one layer")
        count = len(features_K)
        factors = Values.constant(factor, count, "the factor").values_BxTxN
        offsets = offset if isinstance(offset, Values) else Values.constant(offset, count, "the activation")
        return FeatureEdit(self, jnp.asarray(features_K), factors, offsets, error, where, reads, site)

    def _indices(self, features: Sequence[int]) -> np.ndarray:
        indices, n = list(map(operator.index, features)), self.config.n_features
        wrong = [i for i in indices if not 0 <= i < n]
        if wrong:
            raise UserError(f"features {wrong[:5]} do not exist: there are 0 to {n - 1}")
        if not indices or len({*indices}) < len(indices):
            raise UserError(f"features are {indices[:8]}: expected at least one, and none twice")
        return np.asarray(indices, np.int32)
