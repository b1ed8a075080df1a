"""Cross-layer transcoders: of every layer an encoder, whose features write to this layer and to all later ones.

    f_l = sparsity(x_l W_enc_l + b_enc_l),   y_hat_m = sum over l <= m of f_l W_dec_{l -> m} + b_dec_m [+ x_m W_skip_m]

(Ameisen et al., 2025, Circuit Tracing, transformer-circuits.pub), x_l what the MLP of layer l reads and y_m what that
of layer m adds. What the features of a layer write is one matrix, [F, (L - l) D], its blocks of columns the layers from
l on: nothing stands for layers that are not written to, and a row's norm is that of a feature's *joined* decoder, by
which penalties weigh its activation.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from saejax.dictionaries.joined import row_lengths
from saejax.dictionaries.matmul import matmul

#: forms of ``--train.form``: without and with a linear path from what a layer reads to what it predicts.
FORM, SKIP_FORM = "cross_layer_transcoder", "skip_cross_layer_transcoder"
FORMS = (FORM, SKIP_FORM)
KINDS = ("standard", "jumprelu", "batchtopk")  # of which circuit-tracer's folders can hold the result


def joined_lengths(decoders: Sequence[jax.Array]) -> jax.Array:
    """Return the norm of each feature's joined decoder, [L, F], of every layer's [F, X D]; 0 has gradient 0."""
    return jnp.stack(list(map(row_lengths, decoders)))


def sum_writes(
    f_LxBxF: jax.Array, decoders: Sequence[jax.Array], mesh: Mesh, matmul_dtype: str = "float32"
) -> jax.Array:
    """Return what the features of all layers write to each layer, [L, B, D].

    On a mesh with a ``model`` axis every device adds up what its own features write to all layers, and the sums meet
    once: L B D numbers, where products that XLA splits by itself would send half of L^2 B D.

    Args:
      f_LxBxF: activations.
      decoders: every layer's decoder, [F, (L - l) D].
      mesh: features are split over ``model``, tokens over ``member`` and ``data``.
      matmul_dtype: dtype of the operands of the products; see ``matmul``.
    """
    layers, width = len(decoders), decoders[-1].shape[1]
    split = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    by_token = tuple(name for name in split if name != "model")

    def write_all(f_LxBxF: jax.Array, *decoders: jax.Array) -> jax.Array:
        """Sum what the features of a device write to all layers."""
        if by_token:  # said here, so that its gradient is summed over the tokens of all devices
            decoders = tuple(lax.pcast(decoder, by_token, to="varying") for decoder in decoders)
        # The first layer writes to all others, so that its product is the array that the others add to.
        sum_BxX = matmul(f_LxBxF[0], decoders[0], matmul_dtype)  # the first layer writes to all
        for layer, decoder in enumerate(decoders[1:], start=1):
            sum_BxX = sum_BxX.at[:, layer * width :].add(matmul(f_LxBxF[layer], decoder, matmul_dtype))
        sum_BxX = lax.psum(sum_BxX, "model") if "model" in split else sum_BxX
        return jnp.moveaxis(sum_BxX.reshape(-1, layers, width), 1, 0)

    if not split:
        return write_all(f_LxBxF, *decoders)
    tokens, model = by_token or None, "model" if "model" in split else None
    return jax.shard_map(
        write_all,
        mesh=mesh,
        in_specs=(PartitionSpec(None, tokens, model), *[PartitionSpec(model)] * layers),
        out_specs=PartitionSpec(None, tokens),
    )(f_LxBxF, *decoders)
