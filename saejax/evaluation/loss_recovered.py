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
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation import programs
from saejax.evaluation.member_data import MemberData
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches, round_length
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.models.tokens import pad
from saejax.parallel.mesh import by_row, document_devices, sharding
from saejax.progress import OnProgress, silent

VARIANTS = ("clean", "mean_ablated", "zero_ablated", "reconstructed")
_PROGRAM = 1024  # tokens that run in the time in which the programs of another shape are compiled, roughly


@dataclasses.dataclass(frozen=True)
class Losses:
    """Means over predicted tokens under each of ``VARIANTS``, nats."""

    tokens: int  #: number of predicted tokens
    ce: dict[str, float]  #: next-token cross-entropy
    kl: dict[str, float]  #: KL(clean || variant)

    @classmethod
    def of(cls, tokens: int, ce_V: np.ndarray, kl_V: np.ndarray) -> Self:
        """Return the losses with these values, in the order of ``VARIANTS``."""
        return cls(tokens, *(dict(zip(VARIANTS, values_V.tolist(), strict=True)) for values_V in (ce_V, kl_V)))


def recovered(values: dict[str, float], floor: str) -> float | None:
    """Return the recovered share of the loss between ``floor``, "mean_ablated" or "zero_ablated", and the clean model.

    None where the floor is no worse than the clean model: then there is nothing to recover.
    """
    gap = values[floor] - values["clean"]
    return (values[floor] - values["reconstructed"]) / gap if gap > 0 else None


def stand_in_losses(
    lm: LanguageModel,
    dictionaries: Sequence[Dictionary],
    documents: Sequence[np.ndarray],
    mean_D: np.ndarray,
    batch_tokens: int = 4096,
    on_progress: OnProgress = silent,
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
    """
    total = sum(max(len(document) - 1, 0) for document in documents)
    dictionaries = [dictionary.with_sink_norms(lm.sink_norm) for dictionary in dictionaries]
    members = MemberData.of(dictionaries, lm.mesh)
    config = _same_rule(dictionaries)
    site = Site.parse(config.site).check(lm.config)
    target = Site.parse(config.target or config.site).check(lm.config)
    point = SplitPoint(lm.config, target, site, lm.mesh)
    target_limit = config.target_max_norm if config.target else config.max_norm
    site_limit, target_limit, floor_D, zero_D = jax.device_put(
        tuple(np.asarray(a, np.float32) for a in (config.max_norm, target_limit, mean_D, np.zeros_like(mean_D))),
        # Arrays of the programs, not constants: dictionaries with other limits use the same programs.
        sharding(lm.mesh),
    )
    ce_E, kl_E, tokens = np.zeros(3 + len(members)), np.zeros(3 + len(members)), 0
    for ids_BxT, lengths_B, predicted in document_batches(lm, documents, batch_tokens):
        limits = site_limit, target_limit
        stream_BxTxX, x_BxTxD, y_BxTxD, inside_BxT = programs.head(point, lm.params, ids_BxT, *limits)
        values = [y_BxTxD, *(programs.constant(y_BxTxD, inside_BxT, value_D) for value_D in (floor_D, zero_D))]
        values += [programs.stand_in(member, x_BxTxD, y_BxTxD, inside_BxT) for member in members]
        left = [programs.tail(point, lm.params, stream_BxTxX, value_BxTxD) for value_BxTxD in values]
        # Together, so that the clean model's logits, which all variants are compared with, are computed once.
        ce_CxExB, kl_CxExB = programs.compare(lm.config, lm.params, jnp.stack(left), ids_BxT, lengths_B)
        # In fp64: the recovered loss is a difference of sums that are nearly equal.
        ce_E += np.asarray(ce_CxExB, np.float64).sum((0, 2))
        kl_E += np.asarray(kl_CxExB, np.float64).sum((0, 2))
        tokens += predicted
        on_progress(tokens, total)
    ce_E, kl_E = ce_E / max(tokens, 1), kl_E / max(tokens, 1)
    return [Losses.of(tokens, ce_E[[0, 1, 2, index]], kl_E[[0, 1, 2, index]]) for index in range(3, 3 + len(members))]


def _same_rule(dictionaries: Sequence[Dictionary]) -> DictionaryConfig:
    """Return the first one's configuration, after a check that all have its site, target and sink rule."""
    if len({(d.config.site, d.config.target, d.config.max_norm, d.config.target_max_norm) for d in dictionaries}) > 1:
        raise ValueError("dictionaries that are scored together must have one site, target and sink rule")
    return dictionaries[0].config


def document_batches(
    lm: LanguageModel, documents: Sequence[np.ndarray], batch_tokens: int
) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """Yield token ids [B, T], lengths [B] and the number of predicted tokens, on the model's devices."""
    documents = [document for document in documents if len(document) > 1]
    shares = document_devices(lm.mesh)
    lengths_N = np.array([round_length(len(document)) for document in documents], np.int64)
    for chosen, rows, length in even_batches(lengths_N, batch_tokens, shares, _PROGRAM):
        # Rows that fill up a batch have one token, which predicts nothing.
        padded = pad([*(documents[index].tolist() for index in chosen), *[[0]] * (rows - len(chosen))])
        ids_BxT = np.pad(padded.ids_BxT, ((0, 0), (0, length - padded.ids_BxT.shape[1])))
        placed_BxT, lengths_B = by_row(lm.mesh, ids_BxT, padded.lengths_B)
        yield placed_BxT, lengths_B, sum(len(documents[index]) - 1 for index in chosen)
