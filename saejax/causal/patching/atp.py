"""AtP and AtP* of every node of heads, over pairs of prompts; ``heads`` says what they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.parts import OnProgress, silent
from saejax.causal.patching.heads import NODES, effects, record_heads, slopes
from saejax.causal.patching.pairs import Pairs, group_pairs
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.parallel import by_row
from saejax.tasks.behaviours import Prompt

_AT_ONCE = 8  # pairs


class NodeEstimates(NamedTuple):
    """Of each kind of ``NODES`` the estimated effects, mean over the pairs that have the position, fp64 [L, T, H].

    Positions are aligned at the end: the last column is that of every prompt's last token; keys and values have as many
    heads as the model has of them.

    Attributes:
      atp: by how much the logit difference falls.
      atp_star: the size of that, with the QK fix and GradDrop.
    """

    atp: Mapping[str, np.ndarray]
    atp_star: Mapping[str, np.ndarray]


def estimate_nodes(model: LanguageModel, prompts: Sequence[Prompt], on_progress: OnProgress = silent) -> NodeEstimates:
    """Estimates the effect of patching every node with that of the counterpart.

    Args:
      model: the language model; a pair takes a gradient for each of its layers.
      prompts: with counterparts of as many tokens, at least one.
      on_progress: called at the start and after each gradient with those done and of all; may raise to stop.

    Raises:
      UserError: an estimate is not finite.
    """
    site = Site("resid_pre", 0)
    groups = group_pairs(model, SplitPoint(model.config, site, site, model.mesh), prompts)
    batches = [(pairs, first) for pairs in groups for first in range(0, len(pairs.index_P), _AT_ONCE)]
    gradients, columns = 1 + model.config.n_layers, max(int(pairs.ends_P.max()) for pairs in groups)
    counts_T = np.zeros(columns)
    sums: dict[str, np.ndarray] = {}
    for number, (pairs, first) in enumerate(batches):

        def say(done: int, before: int = number * gradients) -> None:
            on_progress(before + done, len(batches) * gradients)

        ends = pairs.ends_P[first : first + _AT_ONCE]
        for name, found_LxBxTxH in _batch(model, pairs, slice(first, first + _AT_ONCE), say).items():
            sums.setdefault(name, np.zeros((found_LxBxTxH.shape[0], columns, found_LxBxTxH.shape[3])))
            for row, end in enumerate(ends):
                sums[name][:, columns - end :] += found_LxBxTxH[:, row, :end]
        for end in ends:
            counts_T[columns - end :] += 1
    if not all(np.isfinite(total).all() for total in sums.values()):
        raise UserError(
            "an estimated effect of a node is not finite: the model's weights hold NaN or it overflows; try "
            "--model.dtype=float32 or another model"
        )
    means = {name: total / counts_T[None, :, None] for name, total in sums.items()}
    return NodeEstimates(*({node: means[f"{kind} {node}"] for node in NODES} for kind in ("atp", "atp_star")))


def _batch(model: LanguageModel, pairs: Pairs, own: slice, say: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Both estimates of some pairs, [L, B, T, H]."""
    config, params, layers = model.config, model.params, model.config.n_layers
    rows = by_row(model.mesh, *pairs.ids_2xBxT[:, own], pairs.last_B[own], pairs.answers_Bx2[own])
    clean, other = (record_heads(config, params, ids_BxT) for ids_BxT in rows[:2])
    drops = range(layers) if layers > 1 else [-1]  # of one layer nothing is left when it is dropped
    plain: tuple[jax.Array, ...] = ()
    sizes: list[np.ndarray] = []
    say(0)
    for done, dropped in enumerate([-1, *drops], 1):
        found = effects(config, clean, other, slopes(config, params, rows[0], *rows[2:], jnp.int32(dropped)))
        if not plain:
            plain = found.plain
        else:
            parts = [np.abs(np.asarray(part, np.float64)) / max(layers - 1, 1) for part in found.fixed]
            sizes = [size + part for size, part in zip(sizes, parts, strict=True)] if sizes else parts
        say(done)
    of_both = dict(atp=[np.asarray(part, np.float64) for part in plain], atp_star=sizes)
    return {f"{kind} {node}": part for kind, parts in of_both.items() for node, part in zip(NODES, parts, strict=True)}
