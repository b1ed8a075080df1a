"""The loss of the model when a dictionary's output replaces its target site: cross-entropy, and KL divergence.

The target of an SAE is the site that it reads; a transcoder reads ``mlp_in.L``, and its prediction replaces
``mlp_out.L`` in the same forward pass. Beside the clean model and the stand-in are two floors: the target replaced by
its mean over training tokens, and by zero. Attention sinks keep their own value in all of them, as in every edit.

    recovered = (floor - reconstructed) / (floor - clean)

of the mean next-token cross-entropy, or of the mean KL divergence of the clean model's predictions from the edited
one's, KL(clean || edited), which is 0 for the clean model. 1 is a perfect stand-in; 0 is no better than the floor. The
mean is the stricter floor of the two, because zero is far from anything the model has seen.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.evaluation import programs
from saejax.evaluation.member_data import MemberData
from saejax.evaluation.results import StandInMeans
from saejax.evaluation.settings import EvaluateConfig
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches, round_length
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.models.tokens import pad
from saejax.parallel.mesh import by_row, document_devices, sharding
from saejax.progress import OnProgress, silent

VARIANTS = ("clean", "mean_ablated", "zero_ablated", "reconstructed")
_PROGRAM = 1024  # tokens that run in the time in which the programs of another shape are compiled, roughly
_LEAST_GAP = 1e-6  # nats: below, rounding makes up the difference of two losses


@dataclasses.dataclass(frozen=True)
class Losses:
    """Means over predicted tokens under each of ``VARIANTS``, nats."""

    tokens: int  #: number of predicted tokens
    ce: dict[str, float]  #: next-token cross-entropy
    kl: dict[str, float]  #: KL(clean || variant)
    groups: tuple["Losses", ...] = ()  #: of each group of predicted tokens, where these were told apart

    def figures(self) -> dict[str, Any]:
        """Return the fields that all results about losses have: both losses, and what is recovered against the mean."""
        return dict(
            ce=StandInMeans(**self.ce, tokens=self.tokens),
            kl=StandInMeans(**self.kl, tokens=None),
            ce_recovered_mean=recovered(self.ce, "mean_ablated"),
            kl_recovered_mean=recovered(self.kl, "mean_ablated"),
        )


class LossSums:
    """Running sums of the losses of the clean model, both floors and some stand-ins.

    They are in fp64, because the recovered loss is a difference of sums that are nearly equal.

    Args:
      stand_ins: number of stand-ins.
      groups: number of groups of predicted tokens whose losses are summed apart, too.
    """

    def __init__(self, stand_ins: int, groups: int = 0):
        self._tokens, self._sums = [0] * (1 + groups), np.zeros((1 + groups, 2, len(VARIANTS) - 1 + stand_ins))

    @property
    def tokens(self) -> int:
        """Number of predicted tokens so far."""
        return self._tokens[0]

    def add(
        self,
        lm: LanguageModel,
        left: Sequence[jax.Array],
        ids_BxT: jax.Array,
        lengths_B: jax.Array,
        predicted: int,
        group_BxT: jax.Array | None = None,
    ) -> None:
        """Add the losses of a batch of ``document_batches``.

        Args:
          lm: the language model.
          left: streams leaving the last layer, [B, T, D]: of the clean model, of both floors, and of each stand-in.
          ids_BxT: the tokens.
          lengths_B: number of tokens of each text.
          predicted: number of predicted tokens.
          group_BxT: the group of each token, from 1 on; 0: none.
        """
        # Together, so that the clean model's logits, which all variants are compared with, are computed once.
        streams = jnp.stack(left)
        self._add(0, predicted, programs.compare(lm.config, lm.params, streams, ids_BxT, lengths_B))
        for group in range(1, len(self._tokens)) if group_BxT is not None else ():
            # Of the token that a position predicts.
            counted_BxT = jnp.pad(group_BxT[:, 1:] == group, ((0, 0), (0, 1)))  # type: ignore[index]
            compared = programs.compare(lm.config, lm.params, streams, ids_BxT, lengths_B, counted_BxT)
            self._add(group, int(counted_BxT.sum()), compared)

    def _add(self, group: int, predicted: int, compared: tuple[jax.Array, jax.Array]) -> None:
        self._sums[group] += [np.asarray(values_CxExB, np.float64).sum((0, 2)) for values_CxExB in compared]
        self._tokens[group] += predicted

    def losses(self) -> list[Losses]:
        """Return the losses of each stand-in."""
        whole, *groups = (self._means(*of_group) for of_group in zip(self._tokens, self._sums, strict=True))
        return [dataclasses.replace(losses, groups=tuple(of[i] for of in groups)) for i, losses in enumerate(whole)]

    def _means(self, tokens: int, sums_2xE: np.ndarray) -> list[Losses]:
        """Return the losses of each stand-in on one group of tokens."""
        means_2xE, floors = sums_2xE / max(tokens, 1), range(len(VARIANTS) - 1)
        losses = []
        for index in range(len(floors), means_2xE.shape[1]):
            ce, kl = (dict(zip(VARIANTS, mean_V, strict=True)) for mean_V in means_2xE[:, [*floors, index]].tolist())
            losses.append(Losses(tokens, ce, kl))
        return losses


def recovered(values: dict[str, float], floor: str) -> float | None:
    """Return the recovered share of the loss between ``floor``, "mean_ablated" or "zero_ablated", and the clean model.

    None where the floor is no worse than the clean model but for rounding: then there is nothing to recover.
    """
    gap = values[floor] - values["clean"]
    return (values[floor] - values["reconstructed"]) / gap if gap > _LEAST_GAP else None


def stand_in_losses(
    lm: LanguageModel,
    dictionaries: Sequence[Dictionary],
    documents: Sequence[np.ndarray],
    mean_D: np.ndarray,
    batch_tokens: int = 4096,
    on_progress: OnProgress = silent,
    groups: Sequence[np.ndarray] = (),
) -> list[Losses]:
    """Return the losses of dictionaries that read one site and have one target.

    The layers below, the clean model and the floors run once for all of them.

    Args:
      lm: the language model.
      dictionaries: dictionaries of one kind and shape, with the same site, target and sink rule (default: the model's).
      documents: token ids; documents of one token predict nothing.
      mean_D: the target's mean over training tokens.
      batch_tokens: tokens per program, padding included.
      on_progress: called with the tokens that are scored and all.
      groups: for each document the group of each token, see ``grouped_batches``.
    """
    total = count_predicted(documents)
    dictionaries = [dictionary.with_sink_norms(lm.sink_norm) for dictionary in dictionaries]
    members = MemberData.of(dictionaries, lm.mesh)
    rules = {(d.config.site, d.config.target, d.config.max_norm, d.config.target_max_norm) for d in dictionaries}
    if len(rules) > 1:
        raise ValueError("dictionaries that are scored together must have one site, target and sink rule")
    config = dictionaries[0].config
    site = Site.parse(config.site).check(lm.config)
    target = Site.parse(config.target or config.site).check(lm.config)
    point = SplitPoint(lm.config, target, site, lm.mesh)
    target_limit = config.target_max_norm if config.target else config.max_norm
    site_limit, target_limit, floor_O, zero_O = jax.device_put(
        tuple(np.asarray(a, np.float32) for a in (config.max_norm, target_limit, mean_D, np.zeros_like(mean_D))),
        # Arrays of the programs, not constants: dictionaries with other limits use the same programs.
        sharding(lm.mesh),
    )
    sums = LossSums(len(members), count_groups(groups))
    for batch, group_BxT in grouped_batches(lm, documents, groups, batch_tokens):
        ids_BxT, *_ = batch
        limits = site_limit, target_limit
        stream_BxTxX, x_BxTxD, y_BxTxO, inside_BxT = programs.head(point, lm.params, ids_BxT, *limits)
        values = [y_BxTxO, *(programs.constant(y_BxTxO, inside_BxT, value_O) for value_O in (floor_O, zero_O))]
        values += [programs.stand_in(member, x_BxTxD, y_BxTxO, inside_BxT) for member in members]
        left = [programs.tail(point, lm.params, stream_BxTxX, value_BxTxO) for value_BxTxO in values]
        sums.add(lm, left, *batch, group_BxT)
        on_progress(sums.tokens, total)
    return sums.losses()


def scored_documents(store: Store, config: EvaluateConfig) -> list[np.ndarray]:
    """Return the token ids of the held-out documents on which losses are measured."""
    documents = store.documents.of("held_out")
    return documents[: config.ce_documents] if config.ce_documents else documents


def document_batches(
    lm: LanguageModel, documents: Sequence[np.ndarray], batch_tokens: int
) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """Yield token ids [B, T], lengths [B] and the number of predicted tokens, on the model's devices."""
    documents = [document for document in documents if len(document) > 1]
    lengths_N = np.array([round_length(len(document)) for document in documents], np.int64)
    for chosen, rows, length in even_batches(lengths_N, batch_tokens, document_devices(lm.mesh), _PROGRAM):
        yield place_documents(lm, [documents[index] for index in chosen], rows, length)


def place_documents(
    lm: LanguageModel, documents: Sequence[np.ndarray], rows: int, length: int
) -> tuple[jax.Array, jax.Array, int]:
    """Return token ids [B, T], lengths [B] and the number of predicted tokens of a batch, on the model's devices.

    Args:
      lm: the model.
      documents: token ids of each document.
      rows: B, at least as many.
      length: T, at least as long.
    """
    # Rows that fill up a batch have one token, which predicts nothing.
    padded = pad([*(document.tolist() for document in documents), *[[0]] * (rows - len(documents))])
    ids_BxT = np.pad(padded.ids_BxT, ((0, 0), (0, length - padded.ids_BxT.shape[1])))
    placed_BxT, lengths_B = by_row(lm.mesh, ids_BxT, padded.lengths_B)
    return placed_BxT, lengths_B, sum(len(document) - 1 for document in documents)


def count_predicted(documents: Sequence[np.ndarray]) -> int:
    """Return the number of predicted tokens: all but the first of each document."""
    return sum(max(len(document) - 1, 0) for document in documents)


def count_groups(groups: Sequence[np.ndarray]) -> int:
    """Return the number of groups of tokens; they count from 1."""
    return max((int(group_T.max(initial=0)) for group_T in groups), default=0)


def grouped_batches(
    lm: LanguageModel, documents: Sequence[np.ndarray], groups: Sequence[np.ndarray], batch_tokens: int
) -> Iterator[tuple[tuple[jax.Array, jax.Array, int], jax.Array | None]]:
    """Yield what ``document_batches`` yields, and the group of each token, [B, T].

    Args:
      lm: the language model.
      documents: token ids.
      groups: for each document the group of each token, from 1 on; 0: none. Empty: there are no groups.
      batch_tokens: tokens per program, padding included.
    """
    batches = document_batches(lm, documents, batch_tokens)
    if not groups:
        yield from ((batch, None) for batch in batches)
        return
    # Documents of the same lengths, which make the same batches.
    for batch, (group_BxT, *_) in zip(batches, document_batches(lm, groups, batch_tokens), strict=True):
        yield batch, group_BxT
