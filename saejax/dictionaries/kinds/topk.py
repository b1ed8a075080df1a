"""The k largest pre-activations of each token (Gao et al., 2024)."""

import jax

from saejax.dictionaries import sparsity
from saejax.dictionaries.kinds.base import Kind, MemberEncoder, Numbers


class TopK(Kind):
    """f = the k largest of max(pre, 0), or of pre itself where the dictionary is signed, else 0; no penalty."""

    name = "topk"
    about = "keeps the k largest activations of each token"
    numbers = ("k",)
    keeps_k = True
    depends_on_decoder_norms = True
    no_free_decoder = "has no penalty to hold it in a topk dictionary"

    def encode(self, member: MemberEncoder, pre_xF: jax.Array, projected_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """``member.config.k`` is the largest k of a stack's members."""
        if member.config.signed:
            return sparsity.signed_topk(pre_xF, numbers["k"], member.config.k)
        return sparsity.topk(pre_xF, numbers["k"], member.config.k)

    def fires(self, f_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Where activations are not 0: those of a signed dictionary may be negative."""
        return f_xF != 0
