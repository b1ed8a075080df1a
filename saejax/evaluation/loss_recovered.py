"""Cross-entropy of the model when a dictionary's reconstruction stands in for its site.

Beside the clean model and the reconstruction stand two floors: the site replaced by its mean over training tokens,
and by zero. Attention sinks keep their own value in all of them, as in every edit.

    recovered = (CE_floor - CE_reconstructed) / (CE_floor - CE_clean)

1 is a perfect stand-in; 0 is no better than the floor. The mean is the stricter floor of the two, because
zero is far from anything the model has seen.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.dictionaries import Dictionary
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.tokens import pad
from saejax.parallel import fitting_sharding, sharding

VARIANTS = ("clean", "reconstructed", "mean_ablated", "zero_ablated")


def cross_entropies(
    lm: LanguageModel,
    dictionary: Dictionary,
    documents: Sequence[np.ndarray],
    mean_D: np.ndarray,
    batch_tokens: int = 4096,
) -> dict[str, float]:
    """Mean next-token cross-entropy, nats, under each of ``VARIANTS``, and the number of tokens predicted.

    Args:
      lm: the model.
      dictionary: whose site is replaced.
      documents: token ids; those of one token predict nothing.
      mean_D: the site's mean over training tokens.
      batch_tokens: tokens per program, padding included.
    """
    site = Site.parse(dictionary.site).check(lm.config)
    graph, state = nnx.split(dictionary)
    state, mean_D = jax.device_put((state, jnp.asarray(mean_D, jnp.float32)), sharding(lm.mesh))
    sums, tokens = np.zeros(len(VARIANTS)), 0
    # Longest first: documents of like length share a batch, and the largest program is compiled first.
    documents = sorted((document for document in documents if len(document) > 1), key=len, reverse=True)
    while documents:
        length = -(-len(documents[0]) // 32) * 32
        count = max(1, batch_tokens // length)
        batch, documents = documents[:count], documents[count:]
        padded = pad([*(ids.tolist() for ids in batch), *[[0]] * (count - len(batch))])
        ids_BxT = np.pad(padded.ids_BxT, ((0, 0), (0, length - padded.ids_BxT.shape[1])))
        placed = jax.device_put(ids_BxT, fitting_sharding(lm.mesh, ids_BxT.shape, "data", None))
        lengths_B = jax.device_put(padded.lengths_B, fitting_sharding(lm.mesh, (count,), "data"))
        sums_VxB = document_losses(lm.config, site, graph, lm.params, state, mean_D, placed, lengths_B)
        sums += np.asarray(sums_VxB, np.float64).sum(1)
        tokens += int(sum(len(document) - 1 for document in batch))
    means = sums / max(tokens, 1)
    return dict(zip(VARIANTS, means.tolist(), strict=True), tokens=tokens)


def recovered(ce: dict[str, float], floor: str) -> float | None:
    """Share of the loss between ``floor`` ("mean_ablated" or "zero_ablated") and the clean model that is recovered.

    None where the floor is no worse than the clean model: then there is nothing to recover.
    """
    gap = ce[floor] - ce["clean"]
    return (ce[floor] - ce["reconstructed"]) / gap if gap > 0 else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def document_losses(config, site, graph, params, state, mean_D, ids_BxT, lengths_B) -> jax.Array:
    """Summed cross-entropy of each document under each variant, [4, B]. Layers below the site run once."""
    dictionary = nnx.merge(graph, state)
    stand_ins = (
        lambda value: value,
        dictionary,
        lambda value: jnp.broadcast_to(mean_D[None, None], value.shape),
        jnp.zeros_like,
    )
    x_BxTxD = decoder.run_layers(config, params, decoder.embed(config, params, ids_BxT), 0, site.layer)
    predicts_BxT = jnp.arange(ids_BxT.shape[1] - 1)[None] < lengths_B[:, None] - 1

    def loss(stand_in) -> jax.Array:
        def hook(where, value_BxTxD):
            if where != site:
                return value_BxTxD
            inside_BxTx1 = dictionary.in_domain(value_BxTxD)[..., None]
            return jnp.where(inside_BxTx1, stand_in(value_BxTxD).astype(value_BxTxD.dtype), value_BxTxD)

        y_BxTxD = decoder.run_layers(config, params, x_BxTxD, site.layer, config.n_layers, hook, {site.layer})
        logits_BxTxV = decoder.unembed(config, params, y_BxTxD[:, :-1])
        chosen_BxT = jnp.take_along_axis(logits_BxTxV, ids_BxT[:, 1:, None], -1)[..., 0]
        losses_BxT = jax.nn.logsumexp(logits_BxTxV, -1) - chosen_BxT
        return jnp.sum(jnp.where(predicts_BxT, losses_BxT, 0.0), -1)

    return jnp.stack([loss(stand_in) for stand_in in stand_ins])
