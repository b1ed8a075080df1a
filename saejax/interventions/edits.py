"""Batched edits of a dictionary's features, and of directions of other bases.

An edit acts on the activations f of some features at every editable position,

    f' = f - a (f - r) + b,        x' = x + sum_i (f'_i - f_i) W_dec_i,

where r replaces the activation, a is the fraction of the replacement and b an addend. What the dictionary does not
explain of the site (its error term) stays, as do attention sinks and padding.

    edit       a            r                                      b
    mask       fraction     0, or the replacement of the ablation  0
    scale      1 - factor   0                                      0
    set        1            0                                      value
    add        0                                                   amount
    swap       fraction     the counterpart prompt's activation    0
    resample   fraction     activation at another firing position  0

What replaces an activation (``ActivationReplacement``):

- ``zero``: zero.
- ``mean``: its mean over the positions of some prompts, at every editable position.
- ``random``: where it fires, its activation at another position at which it fires, drawn from the tested prompts of the
  same clean run; a feature that fires at one position only keeps its activation there.
- ``counterpart``: its activation at the same position of the prompt's counterpart; 0 where that is an attention sink.

Activations, and so amounts, are in output units: of a dictionary that normalises tokens they are multiplied with the
scale of the token (``rescale.to_output_units``).

The replacement of a feature does not depend on which others are ablated with it, so the change of a set is the sum of
its features' changes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError

Amount = float | Sequence[float] | np.ndarray
Sets = Sequence[Sequence[int] | np.ndarray]

GATHERED = 1024  # features gathered at once, unless one set has more; fewer are filled up: one width for most programs

WORDS = dict(
    zero="its activation is set to zero",
    mean="its activation is set, at every position, to its mean over the train prompts",
    random="where it fires, its activation is replaced by that at another position at which it fires, drawn at random",
    counterpart="its activation is replaced by that at the same position of the prompt's counterpart",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationReplacement:
    """The source of the activations that replace ablated ones."""

    kind: str = dataclasses.field(default="zero", metadata=dict(static=True))  #: one of the module docstring's (static)
    mean_F: jax.Array | None = None  #: for ``mean``, of every feature
    seed: jax.Array | None = None  #: for ``random``, of the draws, an integer array []

    def of_run(self, number: int) -> "ActivationReplacement":
        """Return the replacement for one of several clean runs, each with independent draws."""
        if self.seed is None or not number:
            return self
        # From the run's number: draws of two clean runs with one seed would be the same.
        seed = np.random.SeedSequence([int(self.seed), number]).generate_state(1)[0]
        return dataclasses.replace(self, seed=np.uint32(seed))

    def removed(
        self,
        f_BxTxK: jax.Array,
        counterpart_BxTxK: jax.Array,
        domain_BxT: jax.Array,
        features_K: jax.Array,
        prompts: jax.Array,
    ) -> jax.Array:
        """Return by how much the activations of K features fall, [B, T, K].

        Args:
          f_BxTxK: the activations on all prompts of a clean run, 0 where they are not editable.
          counterpart_BxTxK: activations of the prompts' counterparts.
          domain_BxT: True at editable positions.
          features_K: the features.
          prompts: number of the B rows that are prompts; the others are copies.
        """
        if self.kind == "zero":
            return f_BxTxK
        if self.kind == "random":
            return f_BxTxK - self._drawn(f_BxTxK, features_K, prompts)
        replacement = self._means(f_BxTxK, features_K) if self.kind == "mean" else counterpart_BxTxK
        return jnp.where(domain_BxT[:, :, None], f_BxTxK - replacement, 0.0)  # not at sinks

    def _means(self, f_BxTxK: jax.Array, features_K: jax.Array) -> jax.Array:
        assert self.mean_F is not None
        return self.mean_F[features_K].astype(f_BxTxK.dtype)[None, None, :]

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
        choices_1xK = fires_NxK.sum(axis=0, keepdims=True) - 1
        # Each feature has its own key: its draws are the same whatever features it is gathered with.
        unit_NxK = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(key, k), (len(f_NxK),)), out_axes=1)(
            features_K
        )
        drawn_NxK = jnp.minimum((unit_NxK * choices_1xK).astype(jnp.int32), jnp.maximum(choices_1xK - 1, 0))
        drawn_NxK = jnp.where(drawn_NxK >= rank_NxK, drawn_NxK + 1, drawn_NxK)  # any position but this one
        resampled_NxK = jnp.take_along_axis(f_NxK, jnp.take_along_axis(place_NxK, drawn_NxK, axis=0), axis=0)
        return jnp.where(fires_NxK & (choices_1xK > 0), resampled_NxK, f_NxK).reshape(shape)


ZERO = ActivationReplacement()


def removed_on_average(f_BxTxF: jax.Array, fires_F: jax.Array, sum_F: jax.Array) -> jax.Array:
    """Return by how much activations fall, mean over the draws of ``random``, [B, T, F].

    Args:
      f_BxTxF: the activations, 0 outside the domain.
      fires_F: at how many positions of the clean run each feature is not 0.
      sum_F: the sum of its activations there.
    """
    choices_1x1xF = fires_F[None, None, :] - 1
    mean_BxTxF = (sum_F[None, None, :] - f_BxTxF) / jnp.maximum(choices_1x1xF, 1)
    return jnp.where((f_BxTxF != 0) & (choices_1x1xF > 0), f_BxTxF - mean_BxTxF, 0.0)


@dataclasses.dataclass(frozen=True)
class FeatureEdits:
    """E edits of the features of one dictionary."""

    dictionary: Dictionary  #: the dictionary of the features, or another basis
    sets: tuple[np.ndarray, ...]  #: the features of each edit, none twice in one
    fractions: tuple[np.ndarray, ...]  #: a, one array ``[len(set)]`` per edit
    addends: tuple[np.ndarray, ...] | None = None  #: b, likewise; None if no edit adds anything
    replacement: ActivationReplacement = ZERO  #: where r comes from

    def __post_init__(self):
        count = self.dictionary.config.n_features
        for members in self.sets:
            if len(set(members.tolist())) != len(members):
                raise UserError(f"the set {members.tolist()} holds a feature twice: name each feature once")
            if len(members) and not (members.min() >= 0 and members.max() < count):
                raise UserError(
                    f"the set {members.tolist()} holds a feature that does not exist: expected numbers from 0 to "
                    f"{count - 1}"
                )

    def __len__(self) -> int:
        return len(self.sets)

    def with_clean_rows(self, count: int) -> "FeatureEdits":
        """Return the edits with ``count`` more behind them that change nothing."""
        nothing = (np.zeros(0),) * count
        return dataclasses.replace(
            self,
            sets=self.sets + (np.zeros(0, np.int64),) * count,
            fractions=self.fractions + nothing,
            addends=None if self.addends is None else self.addends + nothing,
        )

    def over(self, chosen: Sequence[int] | np.ndarray, features_K: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return fractions and addends of some edits over K features, fp32 [M, K] each; 0 for those not named.

        Args:
          chosen: the M edits.
          features_K: rising features, among them all that the edits name.
        """
        fraction_MxK = np.zeros((len(chosen), len(features_K)), np.float32)
        addend_MxK = None if self.addends is None else np.zeros_like(fraction_MxK)
        for m, e in enumerate(chosen):
            column = np.searchsorted(features_K, self.sets[e])
            fraction_MxK[m, column] = self.fractions[e]
            if addend_MxK is not None and self.addends is not None:
                addend_MxK[m, column] = self.addends[e]
        return fraction_MxK, addend_MxK

    def norms(
        self,
        chosen: Sequence[int],
        features_K: np.ndarray,
        fall_PxTxK: np.ndarray,
        W_dec_KxD: np.ndarray,
        editable_PxT: np.ndarray,
    ) -> np.ndarray:
        """Return the norm of the change that some edits make at the site, over all positions, float64 [M, P].

        Args:
          chosen: the M edits.
          features_K: as for ``over``.
          fall_PxTxK: by how much ablation lowers each activation.
          W_dec_KxD: the features' directions.
          editable_PxT: True at editable positions.
        """
        norm_MxP = np.zeros((len(chosen), len(fall_PxTxK)))
        for m, e in enumerate(chosen):
            column = np.searchsorted(features_K, self.sets[e])
            change_PxTxN = fall_PxTxK[:, :, column].astype(np.float64) * self.fractions[e]
            if self.addends is not None:
                change_PxTxN -= editable_PxT[:, :, None] * self.addends[e]
            # |f W|^2 = f (W W^T) f^T: positions are many, the features of a set are few.
            gram_NxN = W_dec_KxD[column].astype(np.float64) @ W_dec_KxD[column].T.astype(np.float64)
            square_P = np.einsum("ptn,nm,ptm->p", change_PxTxN, gram_NxN, change_PxTxN, optimize=True)
            norm_MxP[m] = np.sqrt(np.maximum(square_P, 0.0))
        return norm_MxP

    def chunks(self, most: int = GATHERED) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield runs of edits that name at most ``most`` features together, and those features, rising, padded."""
        chosen: list[int] = []
        together: set[int] = set()
        for number, members in enumerate([*self.sets, None]):
            wider = together.union([] if members is None else members.tolist())
            if chosen and (members is None or len(wider) > most):
                named = np.array(sorted(together) or [0], np.int64)  # programs have no empty arrays
                # The last feature is repeated: its column in ``over`` is the first of its number, so copies change
                # nothing.
                yield chosen, np.pad(named, (0, filled_features(len(named)) - len(named)), mode="edge")
                chosen, wider = [], set([] if members is None else members.tolist())
            chosen.append(number)
            together = wider


def filled_features(count: int) -> int:
    """Return how many features are gathered for ``count``: few numbers, so that programs are used again."""
    return max(2 ** (count - 1).bit_length(), GATHERED)


def mask(
    dictionary: Dictionary, sets: Sets, fractions: Amount = 1.0, replacement: ActivationReplacement = ZERO
) -> FeatureEdits:
    """Return edits that ablate each set of features together.

    Args:
      dictionary: dictionary of the features.
      sets: E sets of features.
      fractions: share that is ablated, 0 to 1; one number, or one per set.
      replacement: what stands in place of an ablated activation.
    """
    members = _sets(sets)
    return FeatureEdits(dictionary, members, _per_feature(members, fractions), None, replacement)


def scale(dictionary: Dictionary, sets: Sets, factors: Amount) -> FeatureEdits:
    """Return edits that multiply the activations of each set by a factor (one number, or one per set)."""
    members = _sets(sets)
    return FeatureEdits(dictionary, members, tuple(1.0 - f for f in _per_feature(members, factors)))


def set_to(dictionary: Dictionary, sets: Sets, values: Amount) -> FeatureEdits:
    """Return edits that set the activations of each set to a value at every editable position."""
    members = _sets(sets)
    return FeatureEdits(dictionary, members, _per_feature(members, 1.0), _per_feature(members, values))


def add(dictionary: Dictionary, sets: Sets, amounts: Amount) -> FeatureEdits:
    """Return edits that add an amount to the activations of each set at every editable position."""
    members = _sets(sets)
    return FeatureEdits(dictionary, members, _per_feature(members, 0.0), _per_feature(members, amounts))


def swap(dictionary: Dictionary, sets: Sets, fractions: Amount = 1.0) -> FeatureEdits:
    """Return edits that give each set the activations that it has in the prompts' counterparts."""
    return mask(dictionary, sets, fractions, ActivationReplacement("counterpart"))


def resample(dictionary: Dictionary, sets: Sets, fractions: Amount = 1.0, seed: int = 456) -> FeatureEdits:
    """Return edits that replace activations by those at other positions at which the feature fires."""
    return mask(dictionary, sets, fractions, ActivationReplacement("random", seed=np.uint32(seed)))


def _sets(sets: Sets) -> tuple[np.ndarray, ...]:
    """Return sets as arrays; raise a ``UserError`` where one holds anything but indices."""
    arrays = [np.asarray(members) for members in sets]
    for members in arrays:
        # Not rounded, and no True for 1: a mask over all features would be taken for features 0 and 1.
        if members.ndim != 1 or (members.size and not np.issubdtype(members.dtype, np.integer)):
            raise UserError(f"a set of features is {members.tolist()!r:.60}: expected a list of their numbers")
    return tuple(members.astype(np.int64) for members in arrays)


def _per_feature(sets: Sequence[np.ndarray], amounts: Amount) -> tuple[np.ndarray, ...]:
    """Return one amount for each feature of each set."""
    if np.shape(amounts) not in ((), (len(sets),)):
        raise UserError(f"there are {len(sets)} sets and amounts of the shape {np.shape(amounts)}: expected one a set")
    amount_E = np.broadcast_to(np.asarray(amounts, np.float64), (len(sets),))
    return tuple(np.full(len(members), amount) for members, amount in zip(sets, amount_E, strict=True))
