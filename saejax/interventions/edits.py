"""Batched edits of a dictionary's features, and of directions of other bases.

An edit acts on the activations f of some features at every editable position,

    f' = f - a (f - r) + b,        x' = x + sum_i (f'_i - f_i) W_dec_i,

where r is what replaces the activation (``saejax.interventions.replacement``), a the fraction of the replacement and b
an addend. What the dictionary does not explain of the site (its error term) stays, as do attention sinks and padding.

    edit       a            r                                      b
    mask       fraction     0, or the replacement of the ablation  0
    scale      1 - factor   0                                      0
    set        1            0                                      value
    add        0                                                   amount
    swap       fraction     the counterpart prompt's activation    0
    resample   fraction     activation at another firing position  0
    project    fraction     0, in a basis of orthonormal directions
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.interventions.replacement import ZERO, ActivationReplacement

Amount = float | Sequence[float] | np.ndarray
Sets = Sequence[Sequence[int] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class FeatureEdits:
    """E edits of the features of one dictionary.

    Attributes:
      dictionary: the dictionary of the features, or another basis.
      sets: the features of each edit, none twice in one.
      fractions: a, one array ``[len(set)]`` per edit.
      addends: b, likewise; None if no edit adds anything.
      replacement: where r comes from.
    """

    dictionary: Dictionary
    sets: tuple[np.ndarray, ...]
    fractions: tuple[np.ndarray, ...]
    addends: tuple[np.ndarray, ...] | None = None
    replacement: ActivationReplacement = ZERO

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


def project(site: str, subspaces: Sequence[np.ndarray], fractions: Amount = 1.0) -> FeatureEdits:
    """Return edits that project subspaces out of a site: x' = x - a Q Q^T x, with orthonormal Q.

    Args:
      site: such as ``resid_post.15``.
      subspaces: for each edit, linearly independent directions ``[n, D]`` that span its subspace.
      fractions: a; one number, or one per subspace.

    Raises:
      UserError: the directions of a subspace depend on each other.
    """
    rows: list[np.ndarray] = []
    sets: list[np.ndarray] = []
    for subspace in subspaces:
        Q_DxN, R_NxN = np.linalg.qr(np.asarray(subspace, np.float64).T)
        if np.abs(np.diagonal(R_NxN)).min(initial=np.inf) <= 1e-6 * np.abs(R_NxN).max(initial=0.0):
            raise UserError("the directions of a subspace depend on each other: give linearly independent ones")
        sets.append(np.arange(len(rows), len(rows) + Q_DxN.shape[1]))
        rows += list(Q_DxN.T)
    directions_FxD = jnp.asarray(np.stack(rows), jnp.float32)
    count, width = directions_FxD.shape
    basis = Dictionary(
        DictionaryConfig(kind="linear", site=site, d_in=width, n_features=count),
        W_enc_DxF=directions_FxD.T,
        b_enc_F=jnp.zeros(count),
        W_dec_FxD=directions_FxD,
        b_dec_D=jnp.zeros(width),
    )
    return mask(basis, sets, fractions)


def _sets(sets: Sets) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(members, np.int64) for members in sets)


def _per_feature(sets: Sequence[np.ndarray], amounts: Amount) -> tuple[np.ndarray, ...]:
    """Return one amount for each feature of each set."""
    amount_E = np.broadcast_to(np.asarray(amounts, np.float64), (len(sets),))
    return tuple(np.full(len(members), amount) for members, amount in zip(sets, amount_E, strict=True))
