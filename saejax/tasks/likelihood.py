"""Log-likelihood of continuations: how probable the model finds a given text after a given context.

    log p(continuation | context) = sum_i log p(token_i | context, tokens before i), in nats

Logits are computed at the positions that predict the continuation and nowhere else: a context of a thousand tokens
costs no thousand rows of the vocabulary.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.edits import fit_values
from saejax.models.language_model import Edit, LanguageModel
from saejax.models.lengths import round_length
from saejax.models.tokens import Tokens, encode, pad
from saejax.parallel.mesh import by_row, document_devices
from saejax.reductions import index_of_highest, log_sum_exp

BATCH_TOKENS = 4096  # of a forward pass, padding included
_ROWS_OF_LOGITS = 256  # positions whose logits exist at one time: 50 MB for a vocabulary of 49,152


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The likelihood of one continuation under the model."""

    total: float  #: its log-likelihood in nats, at most 0
    tokens: int  #: its number of tokens, at least 1
    correct_tokens: int  #: how many of them had the highest logit of all where they stand

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.total / self.tokens


def encode_pair(tokenizer: Any, context: str, continuation: str, bos: str = "auto") -> tuple[list[int], list[int]]:
    r"""Return the token ids of a context and of what follows it, split as lm-evaluation-harness does.

    White space at the end of the context is moved to the continuation, because most vocabularies keep a space with
    the word after it; then context and continuation are tokenised together, and what is longer than the context
    alone is the continuation. Where a token reaches over the border, as "{\" in "\boxed{\frac" may do, it belongs to
    the continuation: the harness reads another text there, "\boxed{frac".

    Args:
      tokenizer: of the model.
      context: the text before, not empty.
      continuation: the text to score.
      bos: how the context begins, see ``tokens.encode``; "never" where it holds special tokens already, as the text of
        a chat template does.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    context_ids, whole_ids = (encode(tokenizer, text, bos) for text in (context, context + continuation))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(context_ids, whole_ids, strict=False))
    shared = len(list(same))
    return whole_ids[:shared], whole_ids[shared:]


def loglikelihoods(
    lm: LanguageModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    edits: Sequence[Edit] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> list[Likelihood]:
    """Return the log-likelihood of each continuation after its context, in the order given.

    Args:
      lm: the model. Batches are split over the data axis of its mesh.
      contexts: token ids, at least one each.
      continuations: token ids, at least one each.
      edits: changes to the forward passes. "Last position" means the last one of context and continuation together;
        values by position are [N, T, ...], in the order of the N pairs, T the tokens of the longest.
      batch_tokens: tokens per forward pass, padding included.

    Raises:
      UserError: a context or a continuation is empty, the two are longer than the model's context, an edit does not
        fit, or a log-likelihood is not finite.
    """
    pairs = [(list(context), list(continuation)) for context, continuation in zip(contexts, continuations, strict=True)]
    for number, (context, continuation) in enumerate(pairs):
        for name, ids in (("context", context), ("continuation", continuation)):
            if not ids:
                raise UserError(f"{name} {number} has no tokens: expected at least one")
        if len(context) + len(continuation) > lm.config.context:
            raise UserError(
                f"context {number} has {len(context)} tokens and its continuation {len(continuation)}, together more "
                f"than the model's context of {lm.config.context}: shorten it"
            )
    by_pair, last = dict[int, Likelihood](), f"resid_post.{lm.config.n_layers - 1}"
    # Longest first: pairs of like length share a batch, and what needs the most memory comes first.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]), reverse=True)
    longest = max((len(context) + len(continuation) for context, continuation in pairs), default=0)
    while order:
        # The longest that is left sets the shape of the batch.
        pair_length = sum(map(len, pairs[order[0]]))
        count, length = batch_shape(pair_length, len(order), lm.config.context, document_devices(lm.mesh), batch_tokens)
        batch, order = order[:count], order[count:]
        # Filled up with copies, so that few shapes are compiled.
        filled = batch + batch[-1:] * (count - len(batch))
        fitted = fit_values(edits, (len(pairs), longest), length, filled)
        tokens, positions_BxC, targets_BxC = align([pairs[i] for i in filled], length)
        # Logits follow from the last layer's stream, at the wanted positions only.
        x_BxTxD = lm(tokens, capture=[last], edits=fitted, logits=False).sites[last]
        placed = by_row(lm.mesh, positions_BxC, targets_BxC)
        logp_BxC, hits_BxC = map(np.asarray, token_scores(lm.config, lm.params, x_BxTxD, *placed))
        # float64, as totals of long solutions are compared.
        for i, logp_C, hits_C in zip(batch, logp_BxC.astype(np.float64), hits_BxC):
            n = len(pairs[i][1])
            by_pair[i] = Likelihood(float(logp_C[:n].sum()), n, int(hits_C[:n].sum()))
    for number in range(len(pairs)):
        if not math.isfinite(by_pair[number].total):
            raise UserError(
                f"continuation {number} of {len(pairs)} has the log-likelihood {by_pair[number].total}: the model's "
                "weights hold NaN or it overflows; try --model.dtype=float32 or another model"
            )
    return [by_pair[number] for number in range(len(pairs))]


def batch_shape(longest: int, left: int, limit: int, data: int, batch_tokens: int = BATCH_TOKENS) -> tuple[int, int]:
    """Return the rows and the length of a forward pass.

    Args:
      longest: tokens of the longest text.
      left: texts.
      limit: the model's context.
      data: parts in which the rows are split.
      batch_tokens: as for ``loglikelihoods``.
    """
    length = min(round_length(longest), limit)
    # At most twice as many rows as are left: a power of two, so that the size of the rest is seldom a new one.
    count = max(1, min(batch_tokens // length, 1 << (left - 1).bit_length()))
    return -(-count // data) * data, length


def align(rows: Sequence[tuple[list[int], list[int]]], length: int) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Pad contexts and continuations to a batch.

    Args:
      rows: B pairs of token ids.
      length: T, at least the longest pair's.

    Returns:
      Tokens [B, T]; the position at which each continuation token is predicted, and its id, both [B, C] with C at
      least the longest continuation's length. Beyond a continuation's end both are 0.
    """
    # The last token is not read: nothing is predicted from it. It is kept for edits, for which it is a position.
    padded = pad([context + continuation for context, continuation in rows])
    ids_BxT = np.pad(padded.ids_BxT, ((0, 0), (0, length - padded.ids_BxT.shape[1])))
    widest = min(round_length(max(len(continuation) for _, continuation in rows)), length)
    positions_BxC = np.zeros((len(rows), widest), np.int32)
    targets_BxC = np.zeros((len(rows), widest), np.int32)
    for row, (context, continuation) in enumerate(rows):
        n = len(continuation)
        positions_BxC[row, :n] = np.arange(n) + len(context) - 1
        targets_BxC[row, :n] = continuation
    return Tokens(ids_BxT, padded.lengths_B), positions_BxC, targets_BxC


@functools.partial(jax.jit, static_argnums=0)
def token_scores(
    config: DecoderConfig, params: decoder.Params, x_BxTxD: jax.Array, positions_BxC: jax.Array, targets_BxC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the log-likelihood of the target after each position, and whether it is the likeliest, both [B, C].

    Args:
      config: of the model.
      params: of the model.
      x_BxTxD: the stream leaving the last layer.
      positions_BxC: as ``align`` gives them.
      targets_BxC: as ``align`` gives them.
    """
    rows, columns = positions_BxC.shape
    # A divisor of the columns: all pieces have one shape, as ``lax.map`` needs.
    piece = math.gcd(columns, 1 << max(0, (_ROWS_OF_LOGITS // rows).bit_length() - 1))
    chosen_BxCxD = jnp.take_along_axis(x_BxTxD, positions_BxC[..., None], axis=1)

    def pieces(value: jax.Array) -> jax.Array:
        return jnp.moveaxis(value.reshape(rows, columns // piece, piece, *value.shape[2:]), 1, 0)

    @jax.checkpoint  # for a gradient, no piece's logits are kept
    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BxPxD, targets_BxP = part
        logits_BxPxV = decoder.unembed(config, params, x_BxPxD)
        target_BxP = jnp.take_along_axis(logits_BxPxV, targets_BxP[..., None], axis=-1)[..., 0]
        # Not log_softmax, which would make a second array as large as the logits.
        return target_BxP - log_sum_exp(logits_BxPxV)[..., 0], index_of_highest(logits_BxPxV) == targets_BxP

    def whole(value: jax.Array) -> jax.Array:
        return jnp.moveaxis(value, 0, 1).reshape(rows, columns)

    logp, hits = lax.map(score, (pieces(chosen_BxCxD), pieces(targets_BxC)))
    return whole(logp), whole(hits)
