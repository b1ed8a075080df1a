"""ReLU with an L1 penalty: f = max(pre, 0)."""

import jax

from saejax.dictionaries import losses
from saejax.dictionaries.kinds.base import EncodedBatch, Kind


class Standard(Kind):
    """ReLU; the penalty is l1 * mean over tokens of sum_i f_i |W_dec_i|."""

    name = "standard"
    about = "is a ReLU with an L1 penalty on the activations"
    reads = ("l1",)
    elementwise = True

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """Return L1, weighted by the decoder rows' lengths."""
        return batch.values["l1"] * losses.l1_norm_weighted(batch.f_BxF, batch.dictionary.decoder_norms_F)
