"""What removing directions does to text that has nothing to do with a behaviour: cross-entropy and divergence.

The text is held-out documents of the corpus, of which the first ``LENGTH`` tokens are read. Directions are removed at
all positions but attention sinks. Where a counterpart's activations stand in for removed ones, text has none, and they
are set to zero.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.ablate.results import TextEffect
from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.evaluation import programs
from saejax.interventions.replacement import ActivationSource
from saejax.interventions.split_model import SplitModel, active_features, run_head
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.split import SplitPoint
from saejax.models.tokens import encode, pad
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import sharding
from saejax.results import Interval
from saejax.settings import AblateConfig, CorpusConfig, TaskConfig
from saejax.tasks import corpora
from saejax.tasks.scoring import bootstrap_means

LENGTH = 64  # tokens of a document
_AT_ONCE = 4  # documents of a program
# Which documents [B], the site's value, what is read [B, T, D], where it may change [B, T]: other values, one by one.
Edited = Callable[[np.ndarray, jax.Array, jax.Array, jax.Array], Iterable[jax.Array]]
FOR_DOSE = 4  # documents on which the divergence is measured that is a dose


@dataclasses.dataclass(frozen=True)
class TextDiffs:
    """Sums over the predicted tokens of N documents.

    Attributes:
      tokens_N: how many there are.
      clean_N: cross-entropy with nothing removed.
      rise_SxN: of cross-entropy without each of S sets.
      kl_SxN: KL(clean || without the set).
    """

    tokens_N: np.ndarray
    clean_N: np.ndarray
    rise_SxN: np.ndarray
    kl_SxN: np.ndarray

    def summary(self, config: AblateConfig) -> TextEffect:
        """Of the first set; nats per token."""
        total, tokens_N = float(self.tokens_N.sum()), self.tokens_N.astype(np.float64)
        low_1, high_1 = bootstrap_means(self.rise_SxN[:1], config.bootstrap, config.seed, whole_P=tokens_N)
        return TextEffect(
            documents=len(tokens_N),
            tokens=int(total),
            clean=float(self.clean_N.sum() / total),
            rise=Interval(float(self.rise_SxN[0].sum() / total), float(low_1[0]), float(high_1[0])),
            kl=float(self.kl_SxN[0].sum() / total),
        )


class HeldOutText:
    """Documents on which sets of directions are removed.

    Args:
      documents: token ids, at least 2 of each.
    """

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.documents = [list(document) for document in documents]

    @classmethod
    def of(cls, corpus: CorpusConfig, task: TaskConfig, model: LanguageModel, count: int) -> "HeldOutText | None":
        """Of so many documents of the corpus, evenly spread over those that are held out; None for 0.

        Raises:
          UserError: the corpus cannot be read, or not be split.
        """
        if not count:
            return None
        held_out = corpora.held_out_documents(corpus, task)
        chosen = [held_out[place] for place in np.unique(np.arange(count) * len(held_out) // count)]
        length = min(LENGTH, model.config.context)
        ids = [encode(model.tokenizer, document.text[: 16 * LENGTH])[:length] for document in chosen]
        read = [one for one in ids if len(one) > 1]
        return cls(read) if read else None

    def effects(
        self, split: SplitModel, source: ActivationSource, sets: Sequence[Sequence[int]], documents: int | None = None
    ) -> TextDiffs:
        """Removes each set from the first so many documents, or all.

        Args:
          split: the model, split at the site that the directions are written to.
          source: what stands in their activations' place.
          sets: of directions, at least one.
          documents: how many.
        """
        source = ActivationSource() if source.kind == "counterpart" else source
        asked_U = np.unique(np.concatenate([np.asarray(one, np.int64) for one in [*sets, [0]]]))
        members_SxU = np.stack([np.isin(asked_U, np.asarray(one, np.int64)) for one in sets])
        fill = 2 ** (len(asked_U) - 1).bit_length() - len(asked_U)  # programs of few sizes
        features_K = np.pad(asked_U, (0, fill), mode="edge")
        members_SxK = np.pad(members_SxU, ((0, 0), (0, fill)))

        def without(number_B: np.ndarray, value: jax.Array, read: jax.Array, domain: jax.Array) -> Iterable[jax.Array]:
            real = jnp.int32((number_B < len(self.documents[:documents])).sum())  # the others fill the batch
            removed = _removed(split.point, split.dictionary, source, read, domain, features_K, real)
            return (_without(split.point, value, *removed, members_K) for members_K in members_SxK)

        return self.edited(split, without, documents)

    def edited(self, split: SplitModel, edited: Edited, documents: int | None = None) -> TextDiffs:
        """Puts other values in the site's place in the first so many documents, or all.

        Args:
          edited: gives the values of some documents, as many for all.
          documents: how many.
        """
        own = self.documents[:documents]
        parts = [self._batch(split, edited, own, first) for first in range(0, len(own), _AT_ONCE)]
        ce_ExN, kl_ExN = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        tokens_N = np.array([len(document) - 1 for document in own])
        return TextDiffs(tokens_N, clean_N=ce_ExN[0], rise_SxN=ce_ExN[1:] - ce_ExN[0], kl_SxN=kl_ExN[1:])

    def _batch(self, split: SplitModel, edited: Edited, own: Sequence[Sequence[int]], first: int) -> list[np.ndarray]:
        """Cross-entropy and divergence of the documents from ``first`` on, [E, N]: clean ones, then with each edit."""
        documents, point = own[first : first + _AT_ONCE], split.point
        real = len(documents)
        padded = pad([*documents, *[[0, 0]] * (_AT_ONCE - real)])
        width = round_length(max(map(len, self.documents)))
        ids_BxT = np.pad(padded.ids_BxT, ((0, 0), (0, width - padded.ids_BxT.shape[1])))
        rows = split.by_row(ids_BxT, padded.last_B, np.ones(ids_BxT.shape, bool))
        stream, value, read, domain, _ = run_head(point, split.error, split.params, split.dictionary, *rows)
        values = [value, *edited(first + np.arange(_AT_ONCE), value, read, domain)]
        end_ExBxTxD = jnp.stack([programs.tail(point, split.params, stream, left) for left in values])
        sums = programs.compare(point.config, split.params, end_ExBxTxD, rows[0], split.by_row(padded.lengths_B)[0])
        return [to_host(part).astype(np.float64).sum(axis=0)[:, :real] for part in sums]


@functools.partial(jax.jit, static_argnums=0)
def _removed(
    point: SplitPoint,
    dictionary: Dictionary,
    source: ActivationSource,
    read_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    features_K: jax.Array,
    real: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """By how much K directions' activations fall [B, T, K], and the directions [K, D]; of the rows, ``real`` count."""
    f_BxTxK = active_features(dictionary, read_BxTxD, domain_BxT)[:, :, features_K]
    removed_BxTxK = source.removed(f_BxTxK, f_BxTxK, domain_BxT, features_K, real)
    return jax.lax.with_sharding_constraint(
        (removed_BxTxK, dictionary.W_dec_FxD[...][features_K]), sharding(point.mesh)
    )


@functools.partial(jax.jit, static_argnums=0)
def _without(
    point: SplitPoint, value_BxTxD: jax.Array, removed_BxTxK: jax.Array, W_dec_KxD: jax.Array, members_K: jax.Array
) -> jax.Array:
    """The site's value without those of K directions that are members."""
    removed_BxTxK = jnp.where(members_K[None, None, :], removed_BxTxK, jnp.zeros_like(removed_BxTxK))
    removed_BxTxD = matmul(removed_BxTxK, W_dec_KxD)
    left_BxTxD = (value_BxTxD.astype(removed_BxTxD.dtype) - removed_BxTxD).astype(value_BxTxD.dtype)
    return jax.lax.with_sharding_constraint(left_BxTxD, sharding(point.mesh))
