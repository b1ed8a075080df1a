"""ReLU with an L1 penalty: f = max(pre, 0)."""

import jax

from saejax.dictionaries import losses
from saejax.dictionaries.kinds.base import EncodedBatch, Kind


class Standard(Kind):
    """ReLU; the penalty is l1 * mean over tokens of sum_i f_i |W_dec_i|."""

    name = "standard"
    about = "is a ReLU with an L1 penalty on the activations"

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """L1, weighted by the decoder rows' lengths."""
        weighed = batch.f_BxF, batch.member.arrays["W_dec_FxD"], batch.member.config.widths
        return batch.values["l1"] * losses.l1_norm_weighted(*weighed)
