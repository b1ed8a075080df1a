"""A gate that decides which features are active, and a magnitude of its own for each (Rajamanoharan et al., 2024).

    gate = p + b_enc       magnitude = exp(r_mag) p + b_mag       f = max(magnitude, 0) where gate > 0

Both share the projection p = (x - b_dec) W_enc.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries import losses, sparsity
from saejax.dictionaries.kinds.base import Arrays, Dictionary, EncodedBatch, EncoderInputs, Kind, Numbers
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row


class Gated(Kind):
    """Gate and magnitude; the L1 penalty is on the gate, because the magnitudes should not shrink."""

    name = "gated"
    about = "has a gate that decides which features are active and a magnitude of its own for each"
    reads = ("l1",)
    vectors = ("r_mag_F", "b_mag_F")
    unscaled = ("r_mag_F",)
    elementwise = True
    jumprelu = True

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return magnitudes where the gate is open."""
        scale_F, bias_F = jnp.exp(dictionary.arrays["r_mag_F"]), dictionary.arrays["b_mag_F"]
        projected_xF, ndim = inputs.projected_xF, inputs.projected_xF.ndim
        return sparsity.gated(inputs.pre_xF, projected_xF * row(scale_F, ndim) + row(bias_F, ndim))

    def move_bias(self, arrays: Arrays, shift_F: Any) -> Arrays:
        """Move the gate's bias, and the magnitude's by as much as it is scaled."""
        shifted_F = arrays["b_mag_F"] + np.exp(arrays["r_mag_F"]) * shift_F
        # The magnitude has the projection times exp(r_mag): what the bias gains has to be scaled likewise.
        return super().move_bias(arrays, shift_F) | dict(b_mag_F=shifted_F)

    def as_jumprelu(self, arrays: Arrays) -> Arrays:
        """Turn the gate into a threshold on the magnitude m, with which it shares p (Rajamanoharan et al., 2024).

        f = max(m, 0) where m = exp(r_mag) p + b_mag > b_mag - exp(r_mag) b_enc
        """
        kept = {name: array for name, array in arrays.items() if name not in self.vectors}
        scale_F, b_mag_F = np.exp(arrays["r_mag_F"]), arrays["b_mag_F"]
        # A magnitude has to be above 0 as well, whatever the gate says.
        threshold_F = np.maximum(b_mag_F - scale_F * arrays["b_enc_F"], 0.0)
        return kept | dict(W_enc_DxF=arrays["W_enc_DxF"] * scale_F[None], b_enc_F=b_mag_F, threshold_F=threshold_F)

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """Return L1 of the gates' ReLU."""
        gate_BxF = jax.nn.relu(batch.pre_BxF)
        return batch.values["l1"] * losses.l1_norm_weighted(gate_BxF, batch.dictionary.decoder_norms_F)

    def losses(self, batch: EncodedBatch) -> dict[str, jax.Array]:
        """Return the squared error of the open gates' reconstruction; the decoder is a constant here."""
        # Else the gate's own loss would turn the decoder, which the magnitudes are decoded with, too.
        fixed = {name: lax.stop_gradient(array) for name, array in batch.dictionary.arrays.items()}
        matmul_dtype = batch.dictionary.matmul_dtype
        y_hat_BxO = matmul(jax.nn.relu(batch.pre_BxF), fixed["W_dec_FxD"], matmul_dtype) + row(fixed["b_dec_D"], 2)
        if "W_skip_DxD" in fixed:
            y_hat_BxO += matmul(batch.x_BxD, fixed["W_skip_DxD"], matmul_dtype)
        return dict(gate_error=losses.squared_error(batch.y_BxO, y_hat_BxO, batch.metric_DxD, matmul_dtype))
