"""Distributed alignment search: the few directions of a site that carry an answer over (Geiger et al., 2023, arXiv
2303.02536).

In the subspace that orthonormal directions span, the prompt's value is replaced by its counterpart's. The directions
are learned on train pairs so that the model then prefers the counterpart's answer: the line that features, which were
chosen for no such purpose, are read against. Few pairs can be fitted by chance, so test pairs judge it.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saejax.causal.patching.pairs import patched_differences
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.interventions.split_model import PROMPTS, CleanRun, SiteRows, SplitModel
from saejax.models import decoder
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.runner.parts import OnProgress, silent

_RATE = 1e-2  # of Adam, falling to 0
OPTIMISER = optax.scale_by_adam()


def random_subspace(width: int, dimensions: int, seed: Sequence[int]) -> np.ndarray:
    """Orthonormal directions [D, K], ``width`` by ``dimensions``, uniformly random."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, dimensions)))[0].astype(np.float32)


def learn_subspace(
    split: SplitModel,
    base: Sequence[CleanRun],
    source: Sequence[CleanRun],
    dimensions: int,
    steps: int,
    seed: Sequence[int],
    on_progress: OnProgress = silent,
) -> np.ndarray:
    """The directions [D, K] in which the counterparts' values carry their answers over best, orthonormal.

    The loss is the mean over pairs of -log sigmoid(-d), d the logit difference of the patched prompt: cross-entropy
    between the two answers, of which the counterpart's is right. ``PROMPTS`` pairs a step, in random order.

    Args:
      base, source: runs of the train prompts and of their counterparts, row by row.
      dimensions: K, at most the site's width.
      steps: of Adam.
      seed: of the first directions and of the order.
      on_progress: called with the tokens done and to do, padding included; may raise to stop.

    Raises:
      UserError: the site has fewer dimensions, or the loss is not finite.
    """
    width = base[0].value_BxTxD.shape[-1]
    if dimensions > width:
        raise UserError(f"--patch.das={dimensions}: {split.point.site} has {width} dimensions")
    batches = [
        (own, other, slice(first, first + PROMPTS))
        for own, other in zip(base, source, strict=True)
        for first in range(0, len(own.index_P), PROMPTS)
    ]
    size = PROMPTS * max(own.stream_BxTxD.shape[1] for own in base)
    rng, order = np.random.default_rng(seed), list[int]()
    directions_DxK = jnp.asarray(random_subspace(width, dimensions, seed))
    state, loss = OPTIMISER.init(directions_DxK), jnp.zeros(())
    for step in range(steps):
        on_progress(step * size, steps * size)
        order = order or rng.permutation(len(batches)).tolist()
        own, other, some = batches[order.pop()]
        rate = _RATE * (1 - step / steps)
        (real_B,) = split.by_row(np.arange(some.start, some.stop) < len(own.index_P))
        given = *_placed(split, own, other, some), real_B
        directions_DxK, state, loss = learn_step(split.point, split.params, directions_DxK, state, rate, *given)
    if not np.isfinite(loss):
        raise UserError(f"the loss of a subspace of {split.point.site} is not finite: try --model.dtype=float32")
    return np.asarray(jnp.linalg.qr(directions_DxK)[0])


def patch_subspace(
    split: SplitModel, base: Sequence[CleanRun], source: Sequence[CleanRun], directions_DxK: np.ndarray
) -> np.ndarray:
    """The logit difference of each base prompt with the source's value in a subspace, float64 [P].

    It is replaced where features would be: at wanted positions that are not attention sinks.

    Args:
      base, source: runs of the prompts and of others of as many tokens, row by row.
      directions_DxK: orthonormal.

    Raises:
      UserError: a logit difference is not finite.
    """

    def patched(own: CleanRun, other: CleanRun, some: slice) -> jax.Array:
        return _patched(split.point, split.params, directions_DxK, *_placed(split, own, other, some))

    return patched_differences(split, base, source, patched)


def _placed(split: SplitModel, own: CleanRun, other: CleanRun, some: slice) -> tuple[SiteRows, jax.Array]:
    """What the programs take of some rows: those of the prompts, and the counterparts' values."""
    return split.placed(own.rows(some)), split.by_row(other.value_BxTxD[some])[0]


@functools.partial(jax.jit, static_argnums=0)
def _patched(
    point: SplitPoint,
    params: decoder.Params,
    directions_DxK: jax.Array,
    rows: SiteRows,
    other_BxTxD: jax.Array,
) -> jax.Array:
    """The program of ``patch_subspace``, [B]."""
    change_BxTxD = (other_BxTxD - rows.value_BxTxD).astype(directions_DxK.dtype)
    moved_BxTxD = matmul(matmul(change_BxTxD, directions_DxK), directions_DxK.T)
    moved_BxTxD = jnp.where(rows.domain_BxT[..., None], moved_BxTxD, jnp.zeros_like(moved_BxTxD))
    patched_BxTxD = rows.value_BxTxD + moved_BxTxD.astype(rows.value_BxTxD.dtype)
    x_BxTxD = point.run_suffix(params, rows.stream_BxTxD, patched_BxTxD)
    diff_B = point.logit_difference(params, x_BxTxD, rows.last_B, rows.answers_Bx2)
    return jax.lax.with_sharding_constraint(diff_B, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def learn_step(
    point: SplitPoint,
    params: decoder.Params,
    raw_DxK: jax.Array,
    state: optax.OptState,
    rate: float,
    rows: SiteRows,
    other_BxTxD: jax.Array,
    real_B: jax.Array,
) -> tuple[jax.Array, optax.OptState, jax.Array]:
    """A step of Adam on directions that span the subspace.

    Args:
      raw_DxK, state, rate: the directions, what Adam keeps, and how far a step goes.
      rows, other_BxTxD: prompts, and the values of their counterparts.
      real_B: which pairs are no copies.
    """

    def loss(raw_DxK: jax.Array) -> jax.Array:
        diff_B = _patched(point, params, jnp.linalg.qr(raw_DxK)[0], rows, other_BxTxD)
        return jnp.where(real_B, jax.nn.softplus(diff_B), 0.0).sum() / real_B.sum()

    value, gradient_DxK = jax.value_and_grad(loss)(raw_DxK)
    update_DxK, state = OPTIMISER.update(gradient_DxK, state)
    return optax.apply_updates(raw_DxK, jax.tree.map(lambda part: -rate * part, update_DxK)), state, value
