"""Which features look as if they mattered: estimates for all of them from one backward pass per prompt.

The attribution of feature i on a prompt is activation x gradient,

    a_i = sum_t f_{t,i} <dL/dx_t, W_dec_i>,    L = logit(correct) - logit(wrong) at the last position,

the first-order estimate of how much L falls when the feature is removed, x_t -> x_t - f_{t,i} W_dec_i
(attribution patching; Nanda, 2023; for dictionaries, Marks et al., 2024, arXiv 2403.19647). Where something else is to
take their place (``activation_sources``), f_{t,i} - g_{t,i} stands for f_{t,i}; of random activations g, their mean
over the draws. Two other estimates have the same form and another slope in the gradient's place: ``integrated`` takes
the mean gradient on the way from the clean value to that with g in place of every feature, at the middles of 10 equal
steps (integrated gradients; Sundararajan et al., 2017); ``relp`` goes back through the model by the rules of relevance
patching (``RunRules.backward``). The estimate chooses the candidates; their effects are then measured exactly.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.interventions.activity import firing_sums
from saejax.interventions.replacement import ZERO, ActivationSource, removed_on_average
from saejax.interventions.split_model import CleanRun, SiteRows, SplitModel, active_features, slices
from saejax.models import decoder
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding

STEPS = 10  # of integrated gradients


def points(estimate: str) -> int:
    """At how many values of the site an estimate takes a slope."""
    return STEPS if estimate == "integrated" else 1


def backward_of(estimate: str) -> str:
    """What differentiation goes by; see ``RunRules``."""
    return "relp" if estimate == "relp" else "gradient"


def attribution(
    split: SplitModel,
    runs: Sequence[CleanRun],
    estimate: str = "gradient",
    source: ActivationSource = ZERO,
    counterparts: Sequence[CleanRun] = (),
) -> np.ndarray:
    """Fall of activation x slope of every feature on every prompt.

    Args:
      runs: from ``split.run``; N prompts in all.
      estimate: one of ``settings.ESTIMATES``.
      source: what is to stand in the features' place.
      counterparts: for the source ``counterpart``, from ``split.run_counterparts``.

    Returns:
      fp32 [N, F] in logits; above 0 where what stands in the feature's place should lower the logit difference.
      Attention sinks and padding count for nothing.

    Raises:
      UserError: it is not finite.
    """
    rules = dataclasses.replace(split.point.rules, backward=backward_of(estimate))
    point = dataclasses.replace(split.point, rules=rules)
    shape = sum(len(run.index_P) for run in runs), split.dictionary.config.n_features
    attribution_NxF = np.zeros(shape, np.float32)
    for run, other in zip(runs, counterparts or runs, strict=True):
        sums = firing_sums(split, run) if source.kind == "random" else ()
        for own in slices(run):
            rows = split.placed(run.rows(own))
            lent = (other.read_BxTxD[own], other.domain_BxT[own]) if source.kind == "counterpart" else ()
            attribution_BxF = score_features(
                point, points(estimate), split.params, split.dictionary, rows, source, sums or (*split.by_row(*lent),)
            )
            index_P = run.index_P[own]
            attribution_NxF[index_P] = np.asarray(attribution_BxF)[: len(index_P)]
    if not np.isfinite(attribution_NxF).all():
        raise UserError(
            f"the gradient of the logit difference with respect to {split.point.site} is not finite: the model or the "
            "dictionary holds NaN or overflows; try --model.dtype=float32, or train the dictionary again"
        )
    return attribution_NxF


def leaders(attribution_F: np.ndarray, top: int) -> list[int]:
    """The features of largest attribution, largest first: at most ``top``, and only ones above 0."""
    order_K = np.argsort(-attribution_F, kind="stable")[:top]
    return [int(feature) for feature in order_K if attribution_F[feature] > 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_features(
    point: SplitPoint,
    points: int,
    params: decoder.Params,
    dictionary: Dictionary,
    rows: SiteRows,
    source: ActivationSource = ZERO,
    lent: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """The program behind ``attribution``, for one batch of rows: [B, F].

    Args:
      points: on the way to no feature whose gradients are averaged; 1: the gradient where the prompt is.
      lent: for the source ``counterpart``, what is read and the domain of the counterparts; for ``random``, at how many
        positions of the clean run each feature is not 0, and the sum of its activations.
    """
    value_BxTxD = rows.value_BxTxD
    f_BxTxF = active_features(dictionary, rows.read_BxTxD, rows.domain_BxT)
    if source.kind == "random":
        removed_BxTxF = removed_on_average(f_BxTxF, *lent)
    else:
        other_BxTxF = active_features(dictionary, *lent) if lent else f_BxTxF
        every_F = jnp.arange(f_BxTxF.shape[-1])
        removed_BxTxF = source.removed(f_BxTxF, other_BxTxF, rows.domain_BxT, every_F, jnp.int32(len(rows.last_B)))
    W_dec_FxD = dictionary.W_dec_FxD[...]

    def difference(value_BxTxD: jax.Array) -> jax.Array:
        # Prompts do not see each other, so the gradient of the sum holds every prompt's own.
        x_BxTxD = point.run_suffix(params, rows.stream_BxTxD, value_BxTxD)
        return point.logit_difference(params, x_BxTxD, rows.last_B, rows.answers_Bx2).sum()

    slope = jax.grad(difference)

    if points == 1:
        slope_BxTxD = slope(value_BxTxD)
    else:
        all_BxTxD = matmul(removed_BxTxF, W_dec_FxD).astype(value_BxTxD.dtype)
        shares = (jnp.arange(points, dtype=value_BxTxD.dtype) + 0.5) / points
        slope_BxTxD = jax.lax.map(lambda share: slope(value_BxTxD - share * all_BxTxD), shares).mean(axis=0)
    return jax.lax.with_sharding_constraint(weighted(removed_BxTxF, slope_BxTxD, W_dec_FxD), sharding(point.mesh))


def weighted(f_BxTxF: jax.Array, slope_BxTxD: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Fall f of activation x slope along each feature's direction, row of W_dec, summed over positions: [B, F]."""
    along_BxTxF = matmul(slope_BxTxD.astype(W_dec_FxD.dtype), W_dec_FxD.T)  # dL/df
    return (f_BxTxF * along_BxTxF).sum(axis=1)
