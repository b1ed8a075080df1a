"""Known answers of head patching: the heads of GPT-2 small that were published for indirect object identification.

The heads and their roles are from Wang et al., 2022 (Interpretability in the Wild, arXiv 2211.00593). Their prompts and
counterparts differ in the repeated name alone, as in the behaviour ``ioi``. Up to that name both runs are equal,
so previous token heads, which act before it, have no effect here, whatever they do.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from saejax.models.config import DecoderConfig

BEHAVIOUR, KIND = "ioi", "attn_z"  # the behaviour, and the kind of site, of which heads are known
#: Role -> layer and head of each, counted from 0.
IOI_HEADS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "name mover": ((9, 9), (9, 6), (10, 0)),
    "negative name mover": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (6, 9)),
    "duplicate token": ((0, 1), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
}
_LOWERS, _UNSEEN = "negative name mover", "previous token"  # heads that work against the answer, and that do nothing


@dataclasses.dataclass(frozen=True)
class PublishedHead:
    """A published head beside its measured effect."""

    role: str  #: as published
    layer: int  #: counted from 0
    head: int  #: counted from 0
    effect: float  #: logits that noising it removes, mean over prompts; below 0: it works against the answer
    rank: int  #: among all heads by the size of the effect, from 1
    #: whether the sign is the published one, and the size among as many largest as heads are published; None: the
    #: prompts cannot show it
    is_found: bool | None


def is_gpt2_small(config: DecoderConfig) -> bool:
    """Return whether a model has the sizes of GPT-2 small."""
    sizes = config.n_layers, config.n_heads, config.d_model, config.vocab
    return config.family == "gpt2" and sizes == (12, 12, 768, 50257)


def compare_published_heads(effect_LxH: np.ndarray) -> tuple[PublishedHead, ...]:
    """Return the published heads with their effects.

    Args:
      effect_LxH: logits that noising each head of GPT-2 small removes, at all positions together, mean over prompts of
        "ioi": ``patch(lm, prompts, "attn_z", "all").effect_DxLxHxPxC[1, ..., 0].mean(axis=-1)``.
    """
    order_N = np.argsort(-np.abs(effect_LxH).ravel(), kind="stable")
    rank_LxH = 1 + np.argsort(order_N).reshape(effect_LxH.shape)
    visible = sum(len(heads) for role, heads in IOI_HEADS.items() if role != _UNSEEN)
    compared = []
    for role, heads in IOI_HEADS.items():
        for layer, head in heads:
            effect, rank = float(effect_LxH[layer, head]), int(rank_LxH[layer, head])
            has_sign = effect < 0 if role == _LOWERS else effect > 0
            is_found = None if role == _UNSEEN else has_sign and rank <= visible
            compared.append(PublishedHead(role, layer, head, effect, rank, is_found))
    return tuple(compared)
