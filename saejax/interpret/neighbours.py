"""Descriptions of features by weights alone: tokens promoted and suppressed, and the nearest decoder rows."""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.evaluation.neighbours import cosines_of_block
from saejax.models import decoder, lens
from saejax.models.config import DecoderConfig, TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import IN_STREAM, Site
from saejax.models.tokens import token_text

BINS = 50  # of a histogram of logits
ROWS = 256  # decoder rows in a block


@dataclasses.dataclass(frozen=True)
class OutputTokens:
    """Effects of features on logits by the direct path: final norm, then unembedding.

    The logits come from the decoder row alone, without biases and soft cap, minus their mean over the vocabulary
    (VocabProj: Gur-Arieh et al., 2025, arXiv 2501.08319).
    """

    ids: np.ndarray  #: tokens at either end, [F, 2 count]: the most promoted first, the most suppressed last
    logits: np.ndarray  #: their logits
    counts: np.ndarray  #: tokens by logit, int32 [F, BINS]: bins of one width from the lowest logit to the highest

    def raised(self, some: slice = slice(None)) -> list[tuple[int, ...]]:
        """Return the tokens that each of some features promotes most."""
        return [tuple(token_ids.tolist()) for token_ids in self.ids[some, : self.ids.shape[1] // 2]]


def output_tokens(lm: LanguageModel, W_dec_FxD: jax.Array, count: int) -> OutputTokens:
    """Return the effects of features on logits.

    Args:
      lm: the model.
      W_dec_FxD: decoder rows, which features add to the residual stream.
      count: number of tokens at either end; at most the vocabulary.
    """
    # The last block is filled up: one shape, one program.
    count = min(count, lm.config.vocab)
    parts, block = [], min(ROWS, len(W_dec_FxD))
    for start in range(0, len(W_dec_FxD), block):
        # By their numbers, see ``cosines_of_block``; copies of the last row fill up the last block.
        rows_RxD = jnp.take(W_dec_FxD, start + jnp.arange(block), axis=0, mode="clip")
        parts.append(jax.device_get(logit_lens(lm.config, count, lm.params, rows_RxD)))
    return OutputTokens(*(np.concatenate(part)[: len(W_dec_FxD)] for part in zip(*parts, strict=True)))


def tokens_through_lens(
    lm: LanguageModel,
    dictionaries: LayerDictionaries,
    features: Collection[tuple[int, int]],
    jacobians: Mapping[int, np.ndarray],
    count: int = 8,
) -> dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the tokens that features raise and lower most, as a Jacobian lens reads what they write to the stream.

    What a feature writes to a layer is carried to the last layer by that layer's mean Jacobian, and read there as by
    ``output_tokens``; of a cross-layer transcoder, what reaches the last layer from all layers is added up.

    Args:
      lm: the model.
      dictionaries: transcoders, or SAEs of sites in the stream; features of other sites (mlp_in) are left out.
      features: layer and index of each.
      jacobians: mean Jacobians [D, D] of the streams leaving some layers, such as ``JacobianLens.jacobians``; what is
        written to another layer is read as it is.
      count: number of tokens at either end.

    Returns:
      Of each feature the texts of the tokens that it raises and those that it lowers, the largest effects first.
    """
    named, parts = list[tuple[int, int]](), list[np.ndarray]()
    sites = [Site.parse(config.target or config.site) for config in dictionaries.configs]
    for site in (site for site in sites if site.kind in IN_STREAM):
        index_U = np.array(sorted(index for layer, index in features if layer == site.layer), np.int64)
        if not len(index_U):
            continue
        first = site.layer - (site.kind == "resid_pre")  # the layer whose leaving stream has what is written
        written_XxUxD = np.moveaxis(dictionaries.writes(site.layer, index_U), 1, 0)
        arriving = [_carried(write_UxD, jacobians.get(first + x)) for x, write_UxD in enumerate(written_XxUxD)]
        parts.append(np.sum(arriving, axis=0))
        named += [(site.layer, index) for index in index_U.tolist()]
    if not named:
        return {}
    id_UxC, as_text = output_tokens(lm, jnp.asarray(np.concatenate(parts)), count).ids, token_text(lm.tokenizer)
    half, ends = id_UxC.shape[1] // 2, {}
    for feature, row in zip(named, id_UxC.tolist(), strict=True):
        texts = list(map(as_text, row))
        ends[feature] = tuple(texts[:half]), tuple(texts[half:][::-1])
    return ends


def _carried(write_UxD: np.ndarray, jacobian_DxD: np.ndarray | None) -> np.ndarray:
    """Return directions of a layer's stream as they arrive at the last layer; None: as they are."""
    return write_UxD if jacobian_DxD is None else np.asarray(lens.carry(write_UxD[:, None], jacobian_DxD))[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def logit_lens(
    config: DecoderConfig, count: int, params: dict[str, jax.Array], rows_RxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the tokens at either end of decoder rows, their logits, and counts by logit; see ``OutputTokens``."""
    # The row's part alone: biases are common to all features, and a soft cap would bend logits of long rows.
    plain = dataclasses.replace(config, unembed_bias=False, final_logit_softcap=None)
    bias = {name: jnp.zeros_like(value) for name, value in params.items() if name == "final_norm_bias_D"}
    rows_RxD = rows_RxD.astype(params["embed_VxD"].dtype)
    logits_RxV = decoder.unembed(plain, {**params, **bias}, rows_RxD[None])[0]
    if isinstance(config, TorchConfig):
        # Its modules add their biases in any case: they are all that a row of zeros gives.
        logits_RxV -= decoder.unembed(config, params, jnp.zeros_like(rows_RxD[None, :1]))[0]
    # Softmax ignores a constant, so only differences from the mean say which tokens gain.
    logits_RxV -= logits_RxV.mean(axis=-1, keepdims=True)
    up, up_ids = lax.top_k(logits_RxV, count)
    down, down_ids = lax.top_k(-logits_RxV, count)
    # Not from ``up`` and ``down``: of a slice of a top-k XLA makes a sort of the whole vocabulary.
    low_Rx1, high_Rx1 = logits_RxV.min(axis=-1, keepdims=True), logits_RxV.max(axis=-1, keepdims=True)
    width_Rx1 = jnp.maximum(high_Rx1 - low_Rx1, 1e-30) / BINS
    bin_RxV = jnp.clip(jnp.floor((logits_RxV - low_Rx1) / width_Rx1).astype(jnp.int32), 0, BINS - 1)
    counts = jax.vmap(functools.partial(jnp.bincount, length=BINS))(bin_RxV)
    return (
        jnp.concatenate([up_ids, down_ids[:, ::-1]], axis=1),
        jnp.concatenate([up, -down[:, ::-1]], axis=1),
        counts,
    )


def nearest_rows(W_dec_FxD: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the features with the nearest rows of ``W_dec_FxD`` by cosine, and the cosines, both [F, count]."""
    features = len(W_dec_FxD)
    block, count = min(ROWS, features), min(count, features - 1)
    # The last block starts earlier instead of being filled up: some rows are computed twice, with equal results.
    starts_N = np.minimum(np.arange(0, features, block), features - block)
    ids, cosines = np.empty((features, count), np.int32), np.empty((features, count), np.float32)
    for start in starts_N.tolist():
        cosines[start : start + block], ids[start : start + block] = _nearest_block(block, count, W_dec_FxD, start)
    return ids, cosines


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nearest_block(block: int, count: int, W_dec_FxD: jax.Array, start: jax.Array) -> list[jax.Array]:
    """Return cosines and indices of the rows nearest to each of ``block`` rows from ``start`` on, [block, count]."""
    return lax.top_k(cosines_of_block(block, W_dec_FxD, start), count)
