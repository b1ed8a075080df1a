"""Which features look as if they mattered: estimates for all of them from one backward pass per prompt.

The attribution of feature i on a prompt is activation x gradient,

    a_i = sum_t f_{t,i} <dL/dx_t, W_dec_i>,    L = logit(correct) - logit(wrong) at the last position,

the first-order estimate of how much L falls when the feature is removed, x_t -> x_t - f_{t,i} W_dec_i
(attribution patching; Nanda, 2023; for dictionaries, Marks et al., 2024, arXiv 2403.19647). It chooses the
candidates; their effects are then measured exactly.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from saejax.causal.cut import Cut
from saejax.causal.split import PROMPTS, CleanRun, SplitModel, active_features
from saejax.errors import UserError
from saejax.models import decoder
from saejax.parallel import sharding


def attribution(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Activation x gradient of every feature on every prompt.

    Args:
      split: the model, cut at the dictionary's site.
      runs: from ``split.run``; N prompts in all.

    Returns:
      fp32 [N, F] in logits; above 0 where removing the feature should lower the logit difference. Attention sinks
      and padding count for nothing.

    Raises:
      UserError: it is not finite.
    """
    attribution_NxF = np.zeros((sum(len(run.index_P) for run in runs), _n_features(split)), np.float32)
    for run in runs:
        for first in range(0, len(run.last_B), PROMPTS):
            own = slice(first, first + PROMPTS)
            parts = (run.stream_BxTxD, run.value_BxTxD, run.domain_BxT, run.last_B, run.answers_Bx2)
            attribution_BxF = score_features(
                split.cut, split.graph, split.params, split.state, *split.by_row(*(part[own] for part in parts))
            )
            index_P = run.index_P[own]
            attribution_NxF[index_P] = np.asarray(attribution_BxF)[: len(index_P)]
    if not np.isfinite(attribution_NxF).all():
        raise UserError(
            f"the gradient of the logit difference with respect to {split.cut.site} is not finite: the model or the "
            "dictionary holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
        )
    return attribution_NxF


def leaders(attribution_F: np.ndarray, top: int) -> list[int]:
    """The features of largest attribution, largest first: at most ``top``, and only ones above 0."""
    order_F = np.argsort(-attribution_F, kind="stable")[:top]
    return [int(feature) for feature in order_F if attribution_F[feature] > 0]


def _n_features(split: SplitModel) -> int:
    return nnx.merge(split.graph, split.state).config.n_features


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_features(
    cut: Cut,
    graph: nnx.GraphDef,
    params: decoder.Params,
    state: nnx.State,
    stream_BxTxD: jax.Array,
    value_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    last_B: jax.Array,
    answers_Bx2: jax.Array,
) -> jax.Array:
    """The program behind ``attribution``, for one batch: [B, F]."""
    # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
    slope_BxTxD = jax.grad(lambda value: cut.tail(params, stream_BxTxD, value, last_B, answers_Bx2).sum())(value_BxTxD)
    f_BxTxF = active_features(graph, state, value_BxTxD, domain_BxT)
    W_dec_FxD = nnx.merge(graph, state).W_dec_FxD[...]
    along_BxTxF = slope_BxTxD.astype(W_dec_FxD.dtype) @ W_dec_FxD.T  # dL/df
    return jax.lax.with_sharding_constraint((f_BxTxF * along_BxTxF).sum(axis=1), sharding(cut.mesh))
