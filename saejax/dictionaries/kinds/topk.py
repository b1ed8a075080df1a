"""The k largest pre-activations of each token (Gao et al., 2024)."""

import jax

from saejax.dictionaries import sparsity
from saejax.dictionaries.kinds.base import Dictionary, EncoderInputs, Kind, Numbers


class TopK(Kind):
    """f = the k largest of max(pre, 0), or of pre itself where the dictionary is signed, else 0; no penalty."""

    name = "topk"
    about = "keeps the k largest activations of each token"
    reads = ("k",)
    numbers = ("k",)
    depends_on_decoder_norms = True
    no_free_decoder = "has no penalty to hold it in a topk dictionary"

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return the k largest; ``dictionary.config.k`` is the largest k of a stack's members."""
        if dictionary.config.signed:
            return sparsity.signed_topk(inputs.pre_xF, numbers["k"], dictionary.config.k)
        return sparsity.topk(inputs.pre_xF, numbers["k"], dictionary.config.k)

    def fires(self, f_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Return where activations are not 0: a signed dictionary may have negative ones."""
        return f_xF != 0


def is_plain_topk(kind: Kind) -> bool:
    """Return whether a kind has exactly the activations and reconstruction of ``TopK``, in training too.

    Only such a kind may be computed from sparse codes: one that overrides any method that defines its activations gets
    the dense products, which call that method.
    """
    defining = ("encode", "encode_in_training", "reconstructions", "fires")
    return all(getattr(type(kind), name) is getattr(TopK, name) for name in defining)
