"""Activations of features on a text, layer by layer, and the features that belong to its steps."""

import dataclasses

import jax
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.split_model import active_features
from saejax.matching.track.stack import Stack
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import pad


@dataclasses.dataclass(frozen=True)
class LayerFirings:
    """The A firings of a layer's features on a text, by position and then by strength."""

    #: position_A, feature_A, value_A: where, which, and the activation.
    position_A: np.ndarray
    feature_A: np.ndarray
    value_A: np.ndarray

    @classmethod
    def of(cls, f_TxF: np.ndarray) -> "LayerFirings":
        """Return the firings in activations [T, F], which are 0 where a feature does not fire."""
        position_A, feature_A = np.nonzero(f_TxF)
        value_A = f_TxF[position_A, feature_A]
        # Ties go to the smaller number, so that pages do not depend on the sort.
        order_A = np.lexsort((feature_A, -np.abs(value_A), position_A))
        return cls(position_A[order_A], feature_A[order_A], value_A[order_A].astype(np.float32))

    def strongest(self, count: int) -> "LayerFirings":
        """Return the ``count`` strongest firings of each position."""
        start_A = np.searchsorted(self.position_A, self.position_A, side="left")
        return self[np.arange(len(self.position_A)) - start_A < count]

    def at(self, position: int) -> "LayerFirings":
        """Return the firings at a position."""
        start, stop = np.searchsorted(self.position_A, [position, position + 1])
        return self[np.arange(start, stop)]

    def __getitem__(self, chosen: np.ndarray) -> "LayerFirings":
        return LayerFirings(self.position_A[chosen], self.feature_A[chosen], self.value_A[chosen])


def follow(lm: LanguageModel, stack: Stack, ids_T: np.ndarray) -> list[LayerFirings]:
    """Return what fires on a text in each layer of a stack; nothing at attention sinks, nor where its target has one.

    Raises:
      UserError: an activation is not finite.
    """
    sites = [site for layer in stack for site in (layer.config.site, layer.config.target) if site]
    values = lm(pad([ids_T.tolist()]), capture=[*dict.fromkeys(sites)], logits=False).sites
    firings_by_layer = []
    for layer in stack:
        dictionary, reads = layer.load().with_sink_norms(lm.sink_norm), layer.config.site
        used_1xT = dictionary.is_not_sink(values[reads], values[layer.config.target or reads])
        f_TxF = activations(lm, dictionary, values[reads], used_1xT)
        if not np.isfinite(f_TxF).all():
            raise UserError(f"features of {layer.name} are not finite on this text: try --model.dtype=float32")
        firings_by_layer.append(LayerFirings.of(f_TxF))
    return firings_by_layer


def activations(lm: LanguageModel, dictionary: Dictionary, x_1xTxD: jax.Array, used_1xT: jax.Array) -> np.ndarray:
    """Return the activations of a text where features fire, else 0, [T, F].

    Args:
      lm: the language model.
      dictionary: of the features.
      x_1xTxD: what it reads.
      used_1xT: where features are used.
    """
    dictionary = dictionary.on_mesh(lm.mesh)
    f_1xTxF = active_features(dictionary, x_1xTxD, used_1xT)
    return np.asarray(jax.numpy.where(dictionary.fires(f_1xTxF), f_1xTxF, 0.0))[0].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class StepFeature:
    """A feature that belongs to a part of the text, the one in which its mean activation is largest."""

    feature: int  #: its number
    mean: float  #: its mean activation over the part's tokens; ``contrast``: that minus its mean over the other parts
    contrast: float


def step_features(firings: LayerFirings, segment_T: np.ndarray, count: int) -> list[list[StepFeature]]:
    """Return the features that belong to each segment, at most ``count``, first the features that set it apart most.

    Args:
      firings: of a layer on the text.
      segment_T: which segment each token belongs to, from 0 on; none is empty.
      count: of features of a segment.
    """
    segments = int(segment_T.max()) + 1
    features_U, index_A = np.unique(firings.feature_A, return_inverse=True)
    cell_A = index_A * segments + segment_T[firings.position_A]
    sums = np.bincount(cell_A, np.abs(firings.value_A).astype(np.float64), len(features_U) * segments)
    mean_UxS = sums.reshape(len(features_U), segments) / np.bincount(segment_T, minlength=segments)
    home_U, largest_U = mean_UxS.argmax(axis=1), mean_UxS.max(axis=1)
    # Not the mean alone: what is strong in every step sets none apart.
    contrast_U = largest_U - (mean_UxS.sum(axis=1) - largest_U) / max(segments - 1, 1)
    order_U = np.argsort(-contrast_U, kind="stable")
    return [
        [
            StepFeature(int(features_U[u]), float(largest_U[u]), float(contrast_U[u]))
            for u in order_U[home_U[order_U] == segment][:count]
        ]
        for segment in range(segments)
    ]
