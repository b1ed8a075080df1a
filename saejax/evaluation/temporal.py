"""Scores of temporal SAEs, which read whole texts: the same scores as of dictionaries of single tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.joined import is_not_sink
from saejax.dictionaries.temporal import TemporalSAE
from saejax.evaluation.loss_recovered import Losses, document_batches
from saejax.evaluation.parts import clean_values, part_losses, parts_by_model
from saejax.evaluation.reconstruction import Reconstruction, Spread, Sums, measures
from saejax.models.language_model import LanguageModel


def evaluate_texts(
    lm: LanguageModel,
    sae: TemporalSAE,
    documents: Sequence[np.ndarray],
    mean_D: np.ndarray | None = None,
    batch_tokens: int = 4096,
) -> tuple[Reconstruction, Losses]:
    """Return the reconstruction of whole texts, and the losses with it in place of the site.

    Explained variance is that of novel and predicted features together; L0 and firing count the novel ones.

    Args:
      lm: the model.
      sae: the temporal SAE.
      documents: token ids of texts.
      mean_D: mean of the site's values, the floor of recovered losses; None: their mean over these texts.
      batch_tokens: tokens per program, padding included.
    """
    # As a joined site of one part, of which sinks are known and left as they are.
    limit = lm.sink_norm(sae.site)
    config = dataclasses.replace(sae.config, widths=(sae.config.d_in,), scales=(1.0,), max_norms=(limit,))
    models = parts_by_model(sae.site, lm, None)
    spread, sums = Spread(config.d_in), Sums(config.n_features)
    total_D = np.zeros(config.d_in)
    for ids_BxT, lengths_B, _ in document_batches(lm, documents, batch_tokens):
        x_BxTxD = clean_values(models, ids_BxT, lengths_B)[sae.site].astype(jnp.float32)
        novel_BxTxF, predicted_BxTxF = sae.encode_with_predictions(x_BxTxD)
        y_hat_BxTxD = sae.decode(novel_BxTxF + predicted_BxTxF)
        # Rows that fill up a batch have one token, and texts at least two.
        counted_B = jnp.where(lengths_B > 1, lengths_B, 0)
        is_token_BxT = jnp.arange(x_BxTxD.shape[1])[None] < counted_B[:, None]
        counted_BxT = np.asarray(is_not_sink(config, x_BxTxD) & is_token_BxT)
        f_NxF, y_hat_NxD, x_NxD = (
            np.asarray(value_BxTxX)[counted_BxT] for value_BxTxX in (novel_BxTxF, y_hat_BxTxD, x_BxTxD)
        )
        placed = (jnp.asarray(f_NxF), jnp.asarray(f_NxF > 0), jnp.asarray(y_hat_NxD), jnp.asarray(x_NxD))
        sums.add(*jax.device_get(measures(*placed, len(x_NxD))))
        spread.add(x_NxD)
        total_D += x_NxD.astype(np.float64).sum(0)
    mean_D = total_D / max(spread.tokens, 1) if mean_D is None else mean_D
    stand_in: Any = dataclasses.replace(sae, config=config)  # which is called like a dictionary
    (losses,) = part_losses(models, [stand_in], documents, mean_D, batch_tokens)
    return sums.scores(spread), losses[sae.site]
