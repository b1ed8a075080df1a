"""Scores of the members on held-out tokens while they are trained, as ``evaluation`` defines them.

Features are chosen as at inference: BatchTopK's by a threshold that is calibrated at this step.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.activations.batches import columns_of
from saejax.dictionaries import Dictionary, rescale
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.losses import explained_share
from saejax.dictionaries.results import StandIn
from saejax.evaluation.loss_recovered import recovered
from saejax.evaluation.parts import target_losses
from saejax.evaluation.reconstruction import Spread
from saejax.models.language_model import LanguageModel
from saejax.parallel.mesh import sharding
from saejax.training import cross_layer
from saejax.training.over_members import measure_members
from saejax.training.scales import HELD_OUT_TOKENS, ScaledRows
from saejax.training.stack import Hyperparams, TrainStack, batch_parts
from saejax.training.state import TrainState, finish_dictionary

PREFIX = "held_out_"  # of the names of these scores among the metrics
_AT_A_TIME = 4  # members that are stand-ins in the same passes of the model

Sums = tuple[jax.Array, jax.Array]  # of the members: squared error [M], number of tokens on which features fire [M, F]


class HeldOutScorer:
    """Scores the members of a stack on a sample of held-out tokens, which the host keeps.

    Args:
      stack: what is trained.
      columns: for each (input, target) pair of ``stack.sites`` the raw activations [N, D] of its sites, on tokens that
        are no sinks there; the smallest N counts.
    """

    def __init__(self, stack: TrainStack, columns: Sequence[Mapping[str, np.ndarray]]):
        self._stack, self._parts, self._columns = stack, batch_parts(stack.members), columns
        count, data = min(len(values) for column in columns for values in column.values()), stack.mesh.shape["data"]
        # Batches of one size, as large as in training, so that they fit and are compiled once.
        self._batch = min(stack.config.batch, count) // data * data
        self.tokens = count // max(self._batch, 1) * self._batch
        spreads = {}
        for pair, column in zip(stack.sites, columns, strict=True):
            target_NxD = column[pair[-1]][: self.tokens]
            spreads[pair] = Spread(target_NxD.shape[1])
            spreads[pair].add(target_NxD)
        pairs = [
            (spreads[member.site, member.target], scale.output**2)
            for member, scale in zip(stack.members, stack.scales, strict=True)
        ]
        self._variance_M = np.array([spread.variance * factor for spread, factor in pairs], np.float32)
        self._square_M = np.array([spread.square * factor for spread, factor in pairs], np.float32)
        whole = sharding(stack.mesh)
        self._add = jax.jit(functools.partial(_add_batch, stack), out_shardings=(whole, whole))
        self._finish = jax.jit(_finish, out_shardings=whole)

    @classmethod
    def of(cls, stack: TrainStack, rows: ScaledRows) -> "HeldOutScorer | None":
        """Return a scorer on a sample of the rows that training reads; None if too few of them are held out."""
        columns = columns_of(batch_parts(stack.members), stack.is_cross_layer)
        scorer = cls(stack, [rows.held_out(HELD_OUT_TOKENS, *sites) for sites in columns])
        return scorer if scorer.tokens else None

    def __call__(self, state: TrainState, kept_M: jax.Array | None) -> Arrays:
        """Return explained variance, L0 and the share of features that fire on none of the tokens, each [M].

        Args:
          state: the state of training.
          kept_M: result of ``Calibration`` at this state.
        """
        members, features = state.silent_MxF.shape
        kept_M = jnp.zeros(members, jnp.float32) if kept_M is None else kept_M
        sums: Sums = jnp.zeros(members, jnp.float32), jnp.zeros((members, features), jnp.float32)
        for batch in self._batches():
            sums = self._add(sums, state.params, self._stack.hyperparams, kept_M, batch)
        return self._finish(sums, self._variance_M, self._square_M, np.float32(self.tokens))

    def _batches(self) -> Iterator[tuple[jax.Array, ...]]:
        """Yield the tokens on the devices, as ``inputs.Batches`` gives the tokens of training."""
        for start in range(0, self.tokens, self._batch):
            batch = []
            for part in self._parts:
                columns = zip(part, self._columns, strict=True)
                values_SxBxD = np.stack([column[site][start : start + self._batch] for site, column in columns])
                place = self._stack.batch_sharding
                # Of several processes each places what its own devices hold.
                batch.append(jax.make_array_from_callback(values_SxBxD.shape, place, values_SxBxD.__getitem__))
            yield tuple(batch)


def _add_batch(
    stack: TrainStack,
    sums: Sums,
    params: Arrays,
    hyper: Hyperparams,
    kept_M: jax.Array,
    batch: tuple[jax.Array, ...],
) -> Sums:
    """Return the sums with a batch's sums added."""
    error_M, fired_MxF = sums
    if stack.is_cross_layer:
        x_LxBxD, y_LxBxD = cross_layer.scale_values(stack, hyper, batch)
        error_L, fired_LxF = cross_layer.held_out_sums(stack, params, hyper, kept_M, x_LxBxD, y_LxBxD)  # type: ignore[arg-type]
        return error_M + error_L, fired_MxF + fired_LxF

    def of_member(
        arrays: Arrays, hyper: Hyperparams, x_BxD: jax.Array, y_BxO: jax.Array, kept: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kind = stack.kind
        arrays = rescale.unit_rows(kind, kind.finish(arrays, kept), stack.dictionary.widths)
        member = Dictionary(stack.dictionary, "float32", **arrays)  # as finished dictionaries are read
        numbers = {name: hyper.kind_params[name] for name in kind.numbers}
        f_BxF = member.encode(x_BxD, numbers)
        fired_F = jnp.sum(kind.fires(f_BxF, numbers).astype(jnp.float32), axis=0)
        return jnp.sum(jnp.square(y_BxO - member.decode(f_BxF, x_BxD))).astype(jnp.float32), fired_F

    errors_M, fired = measure_members(stack, of_member, params, hyper, batch, kept_M)
    return error_M + errors_M, fired_MxF + fired


def _finish(sums: Sums, variance_M: jax.Array, square_M: jax.Array, tokens: jax.Array) -> Arrays:
    error_M, fired_MxF = sums
    scores = dict(
        explained_variance=explained_share(error_M, variance_M, square_M),
        l0=jnp.sum(fired_MxF, axis=1) / tokens,
        dead=jnp.mean((fired_MxF == 0).astype(jnp.float32), axis=1),
    )
    return {PREFIX + name: score_M for name, score_M in scores.items()}


class LossScorer:
    """Scores members as stand-ins for their targets in the model: the share of cross-entropy that is recovered.

    Args:
      stack: what is trained; sites of one decoder, and no cross-layer transcoder.
      lm: the model.
      documents: token ids of held-out documents.
    """

    def __init__(self, stack: TrainStack, lm: LanguageModel, documents: Sequence[np.ndarray]):
        self._stack, self._lm, self._documents = stack, lm, documents

    def __call__(self, state: TrainState, kept_M: jax.Array | None) -> Arrays:
        """Return the recovered share [M] against the target's mean; NaN where that does no harm.

        For the arguments see ``HeldOutScorer``.
        """
        shares = [scores.ce_recovered for scores in self.measure(state, kept_M)]
        return {PREFIX + "ce_recovered": np.array([np.nan if share is None else share for share in shares])}

    def measure(self, state: TrainState, kept_M: jax.Array | None) -> list[StandIn]:
        """Return the scores of each member; for the arguments see ``HeldOutScorer``."""
        stack, scores = self._stack, dict[int, StandIn]()
        for pair in stack.sites:
            indices = [i for i, member in enumerate(stack.members) if (member.site, member.target) == pair]
            for group in (indices[first : first + _AT_A_TIME] for first in range(0, len(indices), _AT_A_TIME)):
                finished = (finish_dictionary(stack, state, index, kept_M) for index in group)
                # As finished dictionaries are read.
                members = [Dictionary(dictionary.config, "float32", **dictionary.arrays) for dictionary in finished]
                losses = target_losses(self._lm, members, self._documents, stack.scales[group[0]].bias_D)
                for index, loss in zip(group, losses, strict=True):
                    scores[index] = StandIn(loss.kl["reconstructed"], recovered(loss.ce, "mean_ablated"))
        return [scores[index] for index in range(len(stack.members))]
